"""The decode loop at token level: token ids in, logits out.

Rows of a batch may differ in length; they are padded on the right, never on the left, so that a token's
position is its index in its row.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import Graph
from ortlm.dtypes import Array
from ortlm.errors import BadArtifact, BadOption, ContextFull
from ortlm.runtime.cache import Rows, Shapes, make_cache
from ortlm.runtime.processors import Logits
from ortlm.runtime.session import Backend, Tensor

_log = logging.getLogger(__name__)

# Bounds the activations and logits of a long prompt; the speed is nearly that of one run.
_CHUNK_TOKENS = 512


class Loop:
    """Feeds a decoder graph and owns what goes from step to step: cache, lengths and history.

    ``switch_tokens``: see Manifest.rope_switch_tokens. ``shapes``: what ``state_shapes`` found, if known.
    ``recomputed`` counts how often the switch made the whole history be computed anew.
    """

    def __init__(
        self,
        backend: Backend,
        graph: Graph,
        *,
        context_tokens: int,
        switch_tokens: int | None = None,
        shapes: Shapes | None = None,
        chunk_tokens: int = _CHUNK_TOKENS,
    ) -> None:
        self._backend = backend
        self._graph = graph
        self._context = context_tokens
        self._switch = switch_tokens
        self._chunk = chunk_tokens
        self._binding = backend.binding()
        self._bound: dict[str, Tensor] = {}
        self._ones = np.ones((1, 0), dtype=np.int64)
        self._logits = graph.outputs["logits"]
        self._last_only = backend.outputs[self._logits].shape[1] == 1
        self.cache = make_cache(backend, graph, context_tokens=context_tokens, shapes=shapes)
        self.history: list[list[int]] = []
        self.recomputed = 0
        self._long = False

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max((len(row) for row in self.history), default=0)

    def start(self, rows: int = 1) -> None:
        """Forget everything and begin a batch of ``rows``."""
        self.history = [[] for _ in range(rows)]
        self.cache.start(rows)
        self._long = False

    def append(self, rows: Sequence[Sequence[int]], *, all_logits: bool = False) -> Logits:
        """Feed new tokens of every row.

        Returns the logits after each row's last token, float32 [B, V]; with ``all_logits`` those after every
        token, float32 [B, S, V], where those of padding mean nothing.
        Raises ContextFull if a row would outgrow the context; nothing has changed then.
        """
        self._check(rows)
        total = max(len(old) + len(new) for old, new in zip(self.history, rows, strict=True))
        long = self._switch is not None and total > self._switch
        if self.length and long != self._long:
            return self._recompute(rows, all_logits=all_logits)
        self._long = long
        return self._feed(rows, first=self._switch + 1 if self._switch and long else 0, all_logits=all_logits)

    def step(self, tokens: NDArray[np.int64]) -> Logits:
        """Feed one token per row, int64 [B]; return logits float32 [B, V]."""
        return self.append([[int(token)] for token in tokens])

    def trim(self, length: int) -> None:
        """Go back to at most ``length`` tokens in every row."""
        self.cache.trim(min(length, self.cache.length))
        for row in self.history:
            del row[length:]

    def select(self, rows: Rows) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken more than once."""
        self.cache.select(rows)
        self.history = [list(self.history[row]) for row in rows]

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        if len(rows) != len(self.history):
            raise BadOption(f"the batch has {len(self.history)} rows, but tokens of {len(rows)} were given.")
        for number, (old, new) in enumerate(zip(self.history, rows, strict=True)):
            if not len(new):
                raise BadOption(f"row {number} has no new token; every row needs at least one.")
            if len(old) + len(new) > self._context:
                raise ContextFull(
                    f"the context holds {self._context} tokens; {len(old)} are in it and {len(new)} more "
                    "do not fit. Shorten the prompt or start anew."
                )

    def _recompute(self, rows: Sequence[Sequence[int]], *, all_logits: bool) -> Logits:
        """Feed history and new tokens from the start, because all positions are rotated by another table."""
        _log.info(
            "the text crossed %s tokens, where the position encoding changes; computing %s tokens anew",
            self._switch,
            self.length,
        )
        past = [len(row) for row in self.history]
        everything = [[*old, *new] for old, new in zip(self.history, rows, strict=True)]
        self.start(len(rows))
        self.recomputed += 1
        logits = self.append(everything, all_logits=all_logits)
        if not all_logits:
            return logits
        out = np.zeros((len(rows), max(map(len, rows)), logits.shape[2]), dtype=np.float32)
        for row, (skip, new) in enumerate(zip(past, rows, strict=True)):
            out[row, : len(new)] = logits[row, skip : skip + len(new)]
        return out

    def _feed(self, rows: Sequence[Sequence[int]], *, first: int, all_logits: bool) -> Logits:
        """Run the graph, in chunks if there is one row; the first chunk has at least ``first`` tokens.

        A graph picks its rotation table by the length so far, so a chunk that ends below the switch would
        be rotated by the wrong one.
        """
        ids, counts = _pad(rows)
        if len(rows) > 1 or ids.shape[1] <= 1:
            return self._forward(ids, counts, rows, room=self.length + ids.shape[1], all_logits=all_logits)
        stepwise = all_logits and self._last_only and "logits_to_keep" not in self._graph.optional
        size = 1 if stepwise else self._chunk
        found: list[Logits] = []
        # The whole prompt's room at once: the cache is then not copied from chunk to chunk.
        at, room = 0, self.length + ids.shape[1]
        while at < ids.shape[1]:
            end = at + max(size, first - len(self.history[0]))
            part = [list(rows[0][at:end])]
            logits = self._forward(*_pad(part), part, room=room, all_logits=all_logits)
            found = [*found, logits] if all_logits else [logits]
            at = end
        if not all_logits:
            return found[0]
        out = np.concatenate(found, axis=1)
        if out.shape[1] != ids.shape[1]:
            raise BadArtifact(f"{self._graph.file} gives the logits of a prompt's last token only.")
        return out

    def _forward(
        self,
        ids: NDArray[np.int64],
        counts: NDArray[np.int64],
        rows: Sequence[Sequence[int]],
        *,
        room: int,
        all_logits: bool,
    ) -> Logits:
        """Run the graph once on ids [B, S] of which row b has ``counts[b]`` real ones.

        ``room`` is how many positions the cache will have to hold before long.
        """
        batch, new = ids.shape
        lengths = np.array([len(row) for row in self.history], dtype=np.int64)
        ends = lengths + counts
        total = int(ends.max())
        optional = self._graph.optional
        ragged_append = batch > 1 and new > 1 and self.cache.length > 0
        if ragged_append and "query_lengths" not in optional:
            raise BadArtifact(
                f"{self._graph.file} cannot append several tokens to several rows at once; "
                "append one at a time."
            )
        self._input("input_ids", ids)
        self._input("attention_mask", self._mask(ends, total))
        if "position_ids" in self._graph.inputs:
            self._input("position_ids", lengths[:, None] + np.arange(new, dtype=np.int64))
        if "logits_to_keep" in optional:
            self._input("logits_to_keep", np.array(0 if all_logits else 1, dtype=np.int64), of=optional)
        if "query_lengths" in optional:
            given = counts if ragged_append else np.array([-1])
            self._input("query_lengths", given.astype(np.int32), of=optional)
        self.cache.bind(self._binding, max(room, int(lengths.max()) + new))
        one_only = self._last_only or "logits_to_keep" in optional
        keeps_one = new == 1 or (one_only and not all_logits)
        self._bind_logits(batch if keeps_one else None)
        self._backend.run(self._binding)
        self.cache.advance(total - self.cache.length)
        for old, fresh in zip(self.history, rows, strict=True):
            old.extend(fresh)
        logits = self._binding.result(self._logits).numpy()
        if all_logits:
            return logits.astype(np.float32)
        # Some graphs give the logits of all positions, others those of each row's last token.
        picked = logits[:, 0] if logits.shape[1] == 1 else logits[np.arange(batch), counts - 1]
        return picked.astype(np.float32)

    def _mask(self, ends: NDArray[np.int64], total: int) -> NDArray[np.int64]:
        if len(ends) > 1:
            return (np.arange(total) < ends[:, None]).astype(np.int64)
        if self._ones.shape[1] < total:
            self._ones = np.ones((1, 2 * total), dtype=np.int64)
        return self._ones[:, :total]

    def _input(self, role: str, array: Array, *, of: Mapping[str, str] | None = None) -> None:
        """Bind an input, or only copy its new contents to what is bound already."""
        name = (of or self._graph.inputs)[role]
        bound = self._bound.get(name)
        if bound is not None and bound.array is not None and bound.array.shape == array.shape:
            if role != "attention_mask" or array.shape[0] > 1:
                bound.array[...] = array
            return
        # The mask of one row is a view of shared ones, which nobody writes to; the rest is ours to change.
        tensor = self._backend.tensor(array if role == "attention_mask" else array.copy())
        self._binding.input(name, tensor)
        self._bound[name] = tensor

    def _bind_logits(self, rows: int | None) -> None:
        """Bind memory for logits [rows, 1, V] once; None lets every run return new memory."""
        info = self._backend.outputs[self._logits]
        vocab = info.shape[2]
        if rows is None or vocab is None:
            self._bound.pop(self._logits, None)
            self._binding.output(self._logits, None)
            return
        bound = self._bound.get(self._logits)
        if bound is None or bound.array is None or len(bound.array) != rows:
            self._bound[self._logits] = self._backend.tensor(np.zeros((rows, 1, vocab), info.dtype.numpy))
            self._binding.output(self._logits, self._bound[self._logits])


def _pad(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows padded on the right as ids int64 [B, S], and their own lengths int64 [B].

    Padding repeats a row's first token: any id that the model knows will do.
    """
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.zeros((len(rows), int(counts.max())), dtype=np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
        padded[len(row) :] = row[0]
    return ids, counts
