"""The decode loop at token level: token ids in, logits out.

Rows of a batch may differ in length; they are padded on the right, never on the left, so that a token's
position is its index in its row.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import Graph
from ortlm.dtypes import Array, as_float32
from ortlm.errors import BadArtifact, BadOption, Cancelled, CannotRewind, ContextFull, nearest
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor
from ortlm.runtime.engine.bound_inputs import BoundRun
from ortlm.runtime.engine.captured_steps import CapturedStep, StatePool
from ortlm.runtime.engine.fixed_state_cache import FixedStateCache
from ortlm.runtime.engine.kv_cache import RowIndices, SplitCache, StateInfo, make_cache, state_shapes
from ortlm.runtime.engine.states import FIXED_KINDS, Shapes
from ortlm.runtime.engine.token_ids import (
    FIRST_IMAGE_TOKEN,
    begun_image,
    between_images,
    common_prefix_length,
    grid_positions,
    image_numbers,
)
from ortlm.runtime.engine.types import Logits, TokenEmbedder

_log = logging.getLogger(__name__)

# Bounds the activations and logits of a long prompt. On a CPU the larger pieces are slower: attention computes
# what its mask hides within a piece, and more memory is new when it is first written.
CHUNK_TOKENS = 256
ACCELERATOR_CHUNK_TOKENS = 2048
_UNKNOWN = np.array([-1])
_GONE = "the text went back beyond what the cache holds"


class Loop:
    """Feeds a decoder graph and owns what goes from step to step: cache, lengths and history.

    ``switch_tokens``: see Manifest.rope_switch_tokens. ``shapes``: what ``state_shapes`` found, if known.
    ``embedder`` makes the embeddings that the graph reads, if it reads no ids. ``by_grid``: tokens of images
    have positions by row and column. ``appends_one``: the device takes
    several tokens of a row at once in an empty cache only. ``most_tokens``: it takes no more of a row at once.
    ``pool`` has states of loops that are gone, and what was captured on them.
    ``recomputed`` counts how often the whole history was computed again: because of the switch, or because a
    cache could not rewind as far as was asked.
    """

    def __init__(
        self,
        backend: Backend,
        graph: Graph,
        *,
        context_tokens: int,
        switch_tokens: int | None = None,
        shapes: Shapes | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        embedder: TokenEmbedder | None = None,
        by_grid: bool = False,
        appends_one: bool = False,
        most_tokens: int | None = None,
        pool: StatePool | None = None,
    ) -> None:
        self._backend = backend
        self._graph = graph
        self._context = context_tokens
        self._switch = switch_tokens
        self._chunk = chunk_tokens if most_tokens is None else min(chunk_tokens, most_tokens)
        self._most = most_tokens
        self._appends_one = appends_one
        self._embedder = embedder
        self._grid = by_grid
        # By how much the position of each row's next token differs from its number.
        self._shifts = [0]
        self._appends = any(state.kind == "append" for state in graph.states)
        self._windows = any(state.kind == "window" for state in graph.states)
        # States that no token can be taken out of again: every row has to be fed at least one token in every run.
        self._fixed = any(state.kind in FIXED_KINDS for state in graph.states)
        # Attention that evicts takes no padding, unless it is told the lengths.
        self._whole_rows = self._windows and "query_lengths" not in graph.optional
        # An image whose tokens attend to each other both ways has to be fed as a whole.
        self._whole_images = "picture_numbers" in graph.optional
        # Elsewhere, what is written to memory that is bound is never seen.
        self._in_place = backend.memory.is_host
        # What runs read and write: this loop's own, or what comes with the states.
        self._own = self._bound = BoundRun(backend, graph)
        # Whether the next runs bind what no other run may find bound.
        self._apart = False
        fed = {*graph.inputs.values(), *graph.optional.values(), *(state.past for state in graph.states)}
        # What the graph must be given, and only ``use`` can give.
        self._missing = set(backend.inputs) - fed
        self._extra: dict[str, dict[str, DeviceTensor]] = {}
        self._logits = graph.outputs["logits"]
        self._last_only = backend.outputs[self._logits].shape[1] == 1
        self._shapes = state_shapes(backend, graph) if shapes is None else shapes
        self.cache = make_cache(backend, graph, context_tokens=context_tokens, shapes=self._shapes, pool=pool)
        self.history: list[list[int]] = []
        self.recomputed = 0
        self._long = False
        # So many rows got one token each in the last run, so that the next one finds all but these in place.
        self._steady = 0
        # Logits [B, V] after the history, until another run overwrites them; None if it has changed since.
        self._last: Logits | None = None
        # Logits [B, 1, V] on the device that nobody has asked for.
        self._unread: DeviceTensor | None = None
        self._stopping = threading.Lock()
        self._stopped = False
        self._running: Binding | None = None

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max((len(row) for row in self.history), default=0)

    @property
    def context_tokens(self) -> int:
        """How many tokens a row may have."""
        return self._context

    @property
    def chunk_tokens(self) -> int:
        """How many tokens of a single row a run takes at most, unless more have to be fed at once."""
        return self._chunk

    @property
    def switch_tokens(self) -> int | None:
        """The length above which another rotation table holds, None if there is only one."""
        return self._switch

    def takes_several(self, rows: int) -> bool:
        """Whether a run appends several tokens to each of ``rows`` rows and gives the logits after all of them.

        What was appended can then be trimmed at no cost, which states of one size and windows do not allow.
        """
        if any(state.window is not None for state in self._graph.states):
            return False
        return not self._fixed and self._chunk_of([2] * rows, keep=2) > 1

    def use(self, inputs: Mapping[str, DeviceTensor], *, group: str = "adapter") -> None:
        """Let every run from now on read these further inputs, such as the tensors of an adapter.

        They take the place of those of the same ``group``: what is not among them has its default again.
        """
        gone = self._extra.get(group, {}).keys() - inputs.keys()
        self._extra[group] = dict(inputs)
        if gone:
            # A binding cannot let go of a single input.
            self._own = BoundRun(self._backend, self._graph)
            self._bind_extra()
        else:
            for name, tensor in inputs.items():
                self._own.binding.input(name, tensor)
        # The next run looks for what it is to be bound to, and logits of before are another model's.
        self._steady, self._last = 0, None

    def hold(self, ids: Sequence[int]) -> None:
        """Keep the images that ``ids``, which are to be fed, hold from being forgotten."""
        if self._embedder is not None:
            self._embedder.hold([ids])

    def start(self, rows: int = 1) -> None:
        """Forget everything and begin a batch of ``rows``."""
        self._steady, self._last = 0, None
        self.history = [[] for _ in range(rows)]
        self.cache.start(rows)
        self._long = False

    def append(self, rows: Sequence[Sequence[int]], *, keep: int | None = None) -> Logits:
        """Feed new tokens of every row; a row without any gives the logits of its last token once more.

        Returns the logits after each row's last token, float32 [B, V]; with ``keep`` those after each row's
        last ``keep`` tokens, float32 [B, keep, V], the last one at the end. What lies before a row's first
        new token there means nothing. The next call may overwrite them, so copy what is to stay.
        Raises ContextFull if a row would outgrow the context; nothing has changed then. Raises Cancelled
        after ``cancel``: what was fed before remains.
        """
        if keep is None:
            found = self.append_unread(rows)
            return self.read_logits() if found is None else found
        found = self._append(rows, keep=keep, read=True)
        assert found is not None
        return found

    def append_unread(self, rows: Sequence[Sequence[int]]) -> Logits | None:
        """Do as ``append``; None if the logits are still on the device, for ``read_logits`` or ``most_likely``."""
        found = self._append(rows, keep=1, read=False)
        return None if found is None else found[:, 0]

    def _append(self, rows: Sequence[Sequence[int]], *, keep: int, read: bool) -> Logits | None:
        self._check(rows)
        if self._fixed:
            idle = [i for i, new in enumerate(rows) if not new]
            if idle and keep == 1 and self._can_idle(idle):
                return self._append_around(rows, idle)
        if self._embedder is not None:
            self._embedder.hold((*self.history, *rows))
        if self._whole_images:
            rows = self._with_begun(rows)
        total = max(len(old) + len(new) for old, new in zip(self.history, rows, strict=True))
        long = self._switch is not None and total > self._switch
        if self.length and long != self._long:
            rows = self._forget(
                rows, f"the text crossed {self._switch} tokens, where the position encoding changes"
            )
        elif self._windows or self._fixed:
            rows = self._reachable(rows)
        self._long = long
        # A graph picks its rotation table by the length so far: a chunk that ends below the switch would be
        # rotated by the wrong one.
        least = min(map(len, self.history))
        first = self._switch + 1 - least if self._switch and long else 0
        if self._whole_rows and len(rows) > 1 and not least:
            first = max(first, min(map(len, rows)))
        found = self._feed(rows, first=first, keep=keep, read=read)
        self._last = None if found is None else found[:, -1]
        return found

    def _can_idle(self, idle: Sequence[int]) -> bool:
        """Whether the logits of the rows ``idle`` are at hand, and there is room for a token more in each.

        That token must not be what makes the text so long that positions are encoded in another way.
        """
        most = self._context if self._switch is None or self._long else min(self._context, self._switch)
        return self._last is not None and all(len(self.history[i]) < most for i in idle)

    def _append_around(self, rows: Sequence[Sequence[int]], idle: Sequence[int]) -> Logits:
        """Do as ``_append`` for one position where the rows ``idle`` get no token: those keep their logits.

        To feed their last token once more would take the states before it, which may be far back. So they are fed
        a token that is taken back.
        """
        assert self._last is not None
        if len(idle) == len(rows):
            return self._last[:, None]
        saved = self._last[list(idle)].copy()
        fed = [new or old[-1:] for old, new in zip(self.history, rows, strict=True)]
        found = self._append(fed, keep=1, read=True)
        assert found is not None
        self.trim([len(old) - (not new) for old, new in zip(self.history, rows, strict=True)])
        logits = found[:, 0].copy()
        logits[list(idle)] = saved
        self._last = logits
        return logits[:, None]

    def step(self, tokens: Sequence[int] | NDArray[np.int64]) -> Logits:
        """Feed one token per row, [B], -1 for none; return logits float32 [B, V] as ``append`` does."""
        found = self.step_unread(tokens)
        return self.read_logits() if found is None else found

    def step_unread(self, tokens: Sequence[int] | NDArray[np.int64]) -> Logits | None:
        """Do as ``step``; None if the logits are still on the device, for ``read_logits`` or ``most_likely``."""
        new: list[int] = tokens.tolist() if isinstance(tokens, np.ndarray) else list(map(int, tokens))
        if self._steady == len(new) == len(self.history):
            ends = [len(old) + (token >= 0) for old, token in zip(self.history, new, strict=True)]
            total = max(ends)
            long = self._switch is not None and total > self._switch
            # What these caches hold follows from what was fed, so a token that is fed again must go first.
            again = (self._appends or self._windows or self._fixed) and min(new) < 0
            if total <= self._context and long == self._long and not again:
                return self._step_on(new, ends, total)
        return self.append_unread([[token] if token >= 0 else [] for token in new])

    def read_logits(self) -> Logits:
        """Return the logits float32 [B, V] of the last call that left them unread."""
        assert self._unread is not None
        return as_float32(self._backend.memory.float32(self._unread)[:, 0])

    def most_likely(self) -> NDArray[np.int64] | None:
        """Return each row's most likely token [B], by the logits of the last call that left them unread.

        The lowest id among equals. None if a logit is infinite or not a number, so that they have to be looked at.
        """
        assert self._unread is not None
        return self._backend.memory.most_likely(self._unread)

    def _captured_step(self, total: int) -> CapturedStep | None:
        """Return what feeds one token to each row at once, None if that has to be done input by input."""
        fixed = self.cache.fixed(total)
        if fixed is None or self._embedder is not None or any(self._extra.values()):
            return None
        # A graph picks its rotation table by the width of the mask.
        below = self._switch is not None and not self._long
        return fixed.step(self._graph, total, self._switch if below and self._switch else fixed.capacity)

    def _step_on(self, new: Sequence[int], ends: Sequence[int], total: int) -> Logits | None:
        """Feed every row's next token after a run that did the same: only what changes is bound again."""
        if self._choose_bound(total):
            # Nothing is in place there.
            return self.append_unread([[token] if token >= 0 else [] for token in new])
        inputs, bound = self._graph.inputs, self._bound
        fed = [old[-1] if token < 0 else token for old, token in zip(self.history, new, strict=True)]
        if self._grid and max(fed) >= FIRST_IMAGE_TOKEN:
            return self.append_unread([[token] if token >= 0 else [] for token in new])
        captured = self._captured_step(total)
        if captured is not None:
            with self._stopping:
                self._check_stopped()
            self._steady = 0
            self._unread = captured.run(fed, ends)
            self._stepped(new, ends)
            return None
        self.cache.bind(bound.binding, ends, total)
        if self._embedder is None:
            bound.inputs.rewrite("input_ids", fed)
        else:
            embedded = self._embedder.embed(np.array(fed, dtype=np.int64)[:, None])
            bound.binding.input(inputs["inputs_embeds"], embedded)
        bound.inputs.mask(ends, total)
        if "position_ids" in inputs:
            at = zip(ends, self._shifts, strict=True) if self._grid else ((end, 0) for end in ends)
            bound.inputs.rewrite("position_ids", [end - 1 + shift for end, shift in at])
        self._steady = 0
        self._run(brief=True)
        self._stepped(new, ends)
        self._last = as_float32(self._read_logits()[:, 0])
        return self._last

    def _stepped(self, new: Sequence[int], ends: Sequence[int]) -> None:
        """Take note that every row got its next token."""
        self._steady = len(new)
        self.cache.advance(ends)
        for old, token in zip(self.history, new, strict=True):
            if token >= 0:
                old.append(token)

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Feed new tokens as ``append`` does; return their hidden states float32 [B, S, H].

        Those of rows that are shorter end with values that mean nothing. Raises BadArtifact if the graph has
        no such output.
        """
        # The official builder's configurations do not name it.
        name = self._graph.outputs.get("hidden_states", "hidden_states")
        if name not in self._backend.outputs:
            raise BadArtifact(
                f"{self._graph.file} gives no hidden states. Build the model with --extra_options "
                "include_hidden_states=true."
            )
        self._check(rows)
        if self._embedder is not None:
            self._embedder.hold(rows)
        if any(not row for row in rows):
            raise BadOption("hidden states are of new tokens, so every row must have one at least.")
        self._settle()
        found: list[NDArray[np.float32]] = []

        def take() -> None:
            found.append(self._bound.binding.result(name).numpy().astype(np.float32))
            # The next run's is of another shape.
            self._bound.binding.output(name, None, to_host=True)

        total = max(map(len, rows))
        self._long = self._switch is not None and total > self._switch
        with self._with_output(name):
            self._feed(rows, first=self._switch + 1 if self._switch and self._long else 0, keep=1, after=take)
        return np.concatenate(found, axis=1)

    def again(self, name: str, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> Array:
        """Feed the last ``counts[i]`` tokens of ``texts[i]`` and return what the graph gives as output ``name``.

        The texts are the history, of which nothing more is left then, or more or less of it. A result of shape
        [B, S, ...] is for the S tokens of the longest row, and what comes after shorter ones means nothing; of
        another shape it is what the last run gave. Raises BadArtifact if there is no such output.
        """
        if name not in self._backend.outputs:
            raise BadArtifact(
                f"{self._graph.file} has no output {name!r}." + nearest(name, self._backend.outputs)
            )
        starts = [len(text) - n for text, n in zip(texts, counts, strict=True)]
        rows: Sequence[Sequence[int]] = [text[at:] for text, at in zip(texts, starts, strict=True)]
        self.trim([min(len(old), at) for old, at in zip(self.history, starts, strict=True)])
        if self._fixed:
            self.trim(self.cache.reachable([len(old) for old in self.history]))
        before = [text[len(old) : at] for text, old, at in zip(texts, self.history, starts, strict=True)]
        if any(before):
            self.append(before)
        if self._windows:
            rows = self._reachable(rows)
        longest, fed = max(counts), max(map(len, rows))
        # In one run, if the graph can do that.
        once = len(rows) == 1 or not any(self.history) or self._chunk_of([len(row) for row in rows], 1) > 1
        if name == self._logits and "columns_to_keep" in self._graph.optional:
            logits = self._feed(rows, first=fed if once else 0, keep=longest)
            assert logits is not None
            return logits
        found: list[Array] = []

        def take() -> None:
            result = self._bound.binding.result(name)
            if result.on_device:
                # Logits, which are bound there for many rows.
                width = self._backend.outputs[name].shape[2]
                assert width is not None
                found.extend(self._backend.memory.read([result], 0, width))
            else:
                found.append(result.numpy().copy())
            self._bound.binding.output(name, None, to_host=True)

        with self._with_output(name):
            self._feed(rows, first=fed if once else 0, keep=1, after=take)
        if len(found) > 1 and found[0].ndim > 1:
            return np.concatenate(found, axis=1)[:, -longest:]
        last = found[-1]
        return last[:, -longest:] if last.ndim > 1 and last.shape[1] == fed else last

    def _bind_extra(self) -> None:
        """Bind what ``use`` was given to this loop's own runs."""
        for given in self._extra.values():
            for name, tensor in given.items():
                self._own.binding.input(name, tensor)

    @contextlib.contextmanager
    def _with_output(self, name: str) -> Iterator[None]:
        """Let runs give the output ``name``, in main memory."""
        usual = self._own
        # A binding cannot let go of an output.
        self._own, self._apart = BoundRun(self._backend, self._graph), True
        self._bind_extra()
        self._own.binding.output(name, None, to_host=True)
        try:
            yield
        finally:
            self._own, self._apart, self._steady = usual, False, 0

    def _choose_bound(self, room: int) -> bool:
        """Choose what the next run, for rows of up to ``room`` tokens, is bound to; return if it is another.

        That of states which are used again has them bound already.
        """
        fixed = self.cache.fixed(room)
        if fixed is None or self._apart or self._embedder is not None or any(self._extra.values()):
            wanted = self._own
        else:
            wanted = fixed.bound(self._graph)
        changed = wanted is not self._bound
        self._bound = wanted
        return changed

    def trim(self, lengths: int | Sequence[int]) -> None:
        """Rewind to at most this many tokens, in every row or row by row.

        If the cache no longer holds what that needs, the next ``append`` computes it again.
        """
        self._steady, self._last = 0, None
        each = [lengths] * len(self.history) if isinstance(lengths, int) else lengths
        for row, length in zip(self.history, each, strict=True):
            if length < 0:
                raise CannotRewind(f"a row cannot rewind to {length} tokens.")
            del row[length:]
        with contextlib.suppress(CannotRewind):
            self.cache.trim([len(row) for row in self.history])

    def select(self, rows: RowIndices) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken more than once."""
        self._steady, self._last = 0, None
        start = 0
        if len(rows) == len(self.history):
            # Beams share their prompt and most of what follows.
            moved = [
                (old, self.history[row])
                for at, (old, row) in enumerate(zip(self.history, rows, strict=True))
                if at != row
            ]
            start = min((common_prefix_length(old, new) for old, new in moved), default=0)
        self.cache.select(rows, start)
        self.history = [list(self.history[row]) for row in rows]

    def row(self, row: int) -> list[Array]:
        """Return the states of ``row`` as ``filled`` of a loop of it alone, perhaps parts of the memory itself."""
        length = len(self.history[row])
        return [
            state[row : row + 1] if info.fixed else state[row : row + 1, :, : min(length, state.shape[2])]
            for state, info in zip(self.filled(), self.states, strict=True)
        ]

    def checkpoints(self) -> list[tuple[int, list[Array]]]:
        """Return earlier lengths of the first row, with its states of one size then; see FixedStateCache."""
        parts = self.cache.parts if isinstance(self.cache, SplitCache) else [self.cache]
        return [point for part in parts if isinstance(part, FixedStateCache) for point in part.checkpoints()]

    def join(self, history: Sequence[int], states: Sequence[Array]) -> None:
        """Add a row after the others that resumes from ``history`` and the ``states`` of it alone, see ``row``.

        Raises BadOption if ``switch_tokens`` lies between its length and those of the others, which read another
        rotation table.
        """
        self._steady, self._last = 0, None
        if not self.history:
            self.adopt([history], states)
            return
        if self._switch is not None and (len(history) > self._switch) != self._long:
            raise BadOption(
                f"a row of {len(history)} tokens cannot join rows of up to {self.length}: position encoding "
                f"changes at {self._switch}. Begin another batch for it."
            )
        self.cache.join(states, len(history))
        self.history.append(list(history))

    def leave(self, row: int) -> None:
        """Let go of ``row``, whose place the last one takes."""
        self._steady, self._last = 0, None
        last = self.history.pop()
        if row < len(self.history):
            self.history[row] = last
        if self.history:
            self.cache.leave(row)
            # As long as the longest row that is left, if the cache can rewind as far as the history did.
            with contextlib.suppress(CannotRewind):
                self.cache.trim([len(row) for row in self.history])

    def adopt(self, history: Sequence[Sequence[int]], states: Sequence[Array]) -> None:
        """Resume from ``history`` and the ``states`` that ``filled`` returned for it."""
        self._steady, self._last = 0, None
        self.cache.fill(states, [len(row) for row in history])
        self.history = [list(row) for row in history]
        self._long = self._switch is not None and self.length > self._switch

    def filled(self) -> list[Array]:
        """Return every state as far as the history has filled it, see Cache.read."""
        try:
            self.cache.trim([len(row) for row in self.history])
            return self.cache.read()
        except CannotRewind:
            self.append(
                [[] for _ in self.history] if self._fixed else self._forget([[] for _ in self.history], _GONE)
            )
            return self.cache.read()

    @property
    def states(self) -> list[StateInfo]:
        """What the cache consists of, in its order."""
        return [
            StateInfo(
                state.past,
                self._backend.inputs[state.past].dtype,
                sizes,
                state.window,
                state.kind in FIXED_KINDS,
            )
            for state, sizes in zip(self._graph.states, self._shapes, strict=True)
        ]

    def cancel(self) -> None:
        """End the ``append`` or ``step`` that another thread is in, or else the next one, with Cancelled."""
        with self._stopping:
            self._stopped = True
            if self._running is not None:
                self._running.stop()

    def resume(self) -> None:
        """Take ``cancel`` back, if nothing has met it yet."""
        with self._stopping:
            self._stopped = False
            if self._running is not None:
                self._running.resume()

    def _check_stopped(self) -> None:
        """Raise Cancelled after ``cancel``."""
        stopped, self._stopped = self._stopped, False
        if stopped:
            raise Cancelled("the generation was cancelled.")

    def _run(self, *, brief: bool) -> None:
        """Run what is bound."""
        binding = self._bound.binding
        with self._stopping:
            self._check_stopped()
            self._running = binding
        try:
            self._backend.run(binding, brief=brief)
        except Cancelled:
            self._stopped = False
            raise
        finally:
            with self._stopping:
                self._running = None
                if binding.stopped:
                    # Too late for this run. The binding may serve another loop next.
                    binding.resume()

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        if len(rows) != len(self.history):
            raise BadOption(f"the batch has {len(self.history)} rows, but tokens of {len(rows)} were given.")
        for number, (old, new) in enumerate(zip(self.history, rows, strict=True)):
            if not len(new) and not len(old):
                raise BadOption(f"row {number} has no token; every row needs at least one.")
            if len(old) + len(new) > self._context:
                raise ContextFull(
                    f"the context holds {self._context} tokens; {len(old)} are in it and {len(new)} more "
                    "do not fit. Shorten the prompt or start again."
                )

    def _with_begun(self, rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return ``rows`` with the beginnings of images that end the history, which is cut there."""
        begun = [begun_image(old) for old in self.history]
        if not any(begun):
            return rows
        more = [[*old[len(old) - n :], *new] for old, new, n in zip(self.history, rows, begun, strict=True)]
        self.trim([len(old) - n for old, n in zip(self.history, begun, strict=True)])
        return more

    def _reachable(self, rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return what is to be fed to append ``rows``: those, and before them what the cache lacks."""
        # A row without new tokens gives its last one once more.
        wanted = [len(old) - (0 if new else 1) for old, new in zip(self.history, rows, strict=True)]
        found = self.cache.reachable(wanted)
        if found != wanted and not any(found):
            return self._forget(rows, _GONE)
        self.cache.trim(found)
        if not self._fixed:
            return rows
        more = [[*old[at:], *new] for old, new, at in zip(self.history, rows, found, strict=True)]
        for old, at in zip(self.history, found, strict=True):
            del old[at:]
        return more

    def _settle(self) -> None:
        """Let the cache hold the whole history, which was rewound to where no state is kept."""
        lengths = [len(old) for old in self.history]
        if self._fixed and self.cache.reachable(lengths) != lengths:
            self.append([[] for _ in self.history])

    def _forget(self, rows: Sequence[Sequence[int]], why: str) -> list[list[int]]:
        """Empty the cache and return all that is to be fed then, the history and ``rows``."""
        _log.log(
            logging.DEBUG if self.recomputed else logging.INFO,
            "%s; computing %s tokens again",
            why,
            self.length,
        )
        everything = [[*old, *new] for old, new in zip(self.history, rows, strict=True)]
        self.start(len(rows))
        self.recomputed += 1
        return everything

    def _feed(
        self,
        rows: Sequence[Sequence[int]],
        *,
        first: int,
        keep: int,
        after: Callable[[], None] | None = None,
        read: bool = True,
    ) -> Logits | None:
        """Run the graph in chunks, of which the first has at least ``first`` tokens; logits [B, keep, V].

        ``after`` is called when a chunk has been run. Without ``read``, logits on the device are left there.
        """
        counts = [len(row) for row in rows]
        size, longest = self._chunk_of(counts, keep), max(counts)
        if self._most is not None and min(first, longest) > self._most:
            raise BadOption(
                f"{min(first, longest)} tokens of this prompt have to be fed at once, and the device takes "
                f"{self._most}. Use another device."
            )
        # The whole prompt's room at once: the cache is then not copied from chunk to chunk.
        room = max(len(old) + count for old, count in zip(self.history, counts, strict=True))
        out: Logits | None = None
        at = 0
        while True:
            end = min(at + max(size, first - at), max(longest, 1))
            if self._fixed and len(rows) > 1 and size > 1 and end >= min(counts):
                # A row that has nothing left cannot be fed its last token again.
                end = longest
            if self._whole_images:
                end = between_images(rows, end)
            # A row that has nothing left gives its last token again, at its old place: that changes nothing.
            parts = [row[at:end] or [old.pop()] for row, old in zip(rows, self.history, strict=True)]
            if keep == 1:
                out = self._forward(parts, room=room, keep=1, read=read)
            else:
                # The last ``keep`` tokens of a row may lie in several chunks.
                wanted = max(1, min(end, longest) - max(at, longest - keep)) if len(rows) == 1 else 0
                logits = self._forward(parts, room=room, keep=wanted)
                assert logits is not None
                if out is None:
                    out = np.zeros((len(rows), keep, logits.shape[2]), dtype=np.float32)
                for row, (count, part) in enumerate(zip(counts, parts, strict=True)):
                    low, high = max(at, count - keep), min(end, count)
                    shift = at + len(part) - logits.shape[1] if len(rows) == 1 else at
                    if low < high:
                        out[row, keep - count + low : keep - count + high] = logits[
                            row, low - shift : high - shift
                        ]
                    elif count == 0:
                        out[row, -1] = logits[row, 0 if len(rows) > 1 else -1]
            if after is not None:
                after()
            at = end
            if at >= longest:
                return out

    def _chunk_of(self, counts: Sequence[int], keep: int) -> int:
        """Return how many tokens of each row a run may take."""
        optional, batch = self._graph.optional, len(counts)
        if keep > 1 and self._last_only and "logits_to_keep" not in optional:
            return 1
        if batch == 1 and not self._appends_one:
            return self._chunk
        if "query_lengths" in optional and not self._appends and not self._appends_one:
            return max(32, self._chunk // batch)
        # Such a graph takes several tokens of several rows, or on some devices of one, while the cache is empty,
        # and else one of each.
        size = 1 if any(self.history) or self._whole_rows else max(counts)
        return size if self._most is None or size <= self._most else 1

    def _forward(
        self, rows: Sequence[Sequence[int]], *, room: int, keep: int, read: bool = True
    ) -> Logits | None:
        """Run the graph once on at least one token of every row.

        ``room`` is how many positions the cache will have to hold before long. Returns float32 [B, n, V]: of
        each row's last token (n = 1) if ``keep`` is 1; of the last n = ``keep`` tokens of one row; of all
        n = S tokens of several rows if ``keep`` is 0. None without ``read``, if they stay on the device.
        """
        ids, counts = _pad(rows)
        batch, new = ids.shape
        starts = np.array([len(row) for row in self.history], dtype=np.int64)
        ends = starts + counts
        filled: list[int] = ends.tolist()
        total = max(filled)
        optional = self._graph.optional
        self._check_given()
        self._steady = 0
        room = max(room, int(starts.max()) + new)
        self._choose_bound(room)
        binding, inputs = self._bound.binding, self._bound.inputs
        if self._embedder is None:
            inputs.put("input_ids", ids)
        else:
            binding.input(self._graph.inputs["inputs_embeds"], self._embedder.embed(ids))
        inputs.mask(filled, total)
        if "position_ids" in self._graph.inputs:
            inputs.put("position_ids", self._positions(rows, starts, new))
        if "picture_numbers" in optional:
            inputs.put("picture_numbers", image_numbers(ids, counts), of=optional)
        if "logits_to_keep" in optional:
            inputs.put("logits_to_keep", np.array(keep, dtype=np.int64), of=optional)
        if "columns_to_keep" in optional:
            # The last columns are the last tokens of rows that are equally long.
            columns = keep if (counts == new).all() else 0
            inputs.put("columns_to_keep", np.array(columns, dtype=np.int64), of=optional)
        if "query_lengths" in optional:
            ragged = batch > 1 and new > 1 and bool(starts.any())
            inputs.put("query_lengths", (counts if ragged else _UNKNOWN).astype(np.int32), of=optional)
        if self._appends or self._windows or self._fixed:
            # What they hold follows from what was fed; tokens that are fed again must go first.
            self.cache.trim(starts.tolist())
        self.cache.bind(binding, filled, room)
        one_only = self._last_only or "logits_to_keep" in optional
        self._bind_logits(batch if new == 1 or (one_only and keep == 1) else None)
        # A step is over soon, and can be stopped before the next one.
        self._run(brief=new == 1)
        self.cache.advance(filled)
        for old, fresh in zip(self.history, rows, strict=True):
            old.extend(fresh)
        self._steady = batch if new == keep == 1 and (batch == 1 or "picture_numbers" not in optional) else 0
        if not read and self._bound.logits is not None and self._bound.logits.on_device:
            self._unread = self._bound.logits
            return None
        logits = self._read_logits()
        if keep == 1 and logits.shape[1] > 1:
            # Some graphs give the logits of all positions, others those of each row's last token.
            logits = logits[np.arange(batch), counts - 1][:, None]
        elif keep > 1:
            logits = logits[:, -keep:]
        if logits.shape[1] < (keep or new):
            raise BadArtifact(f"{self._graph.file} gives the logits of a prompt's last token only.")
        return as_float32(logits)

    def _positions(
        self, rows: Sequence[Sequence[int]], starts: NDArray[np.int64], width: int
    ) -> NDArray[np.int64]:
        """Return the positions of new tokens, int64 [B, S], or [3, B, S] where those of images have three."""
        plain = starts[:, None] + np.arange(width, dtype=np.int64)
        if not self._grid:
            return plain
        found = np.broadcast_to(plain, (3, *plain.shape)).copy()
        self._shifts = []
        for i, (old, row) in enumerate(zip(self.history, rows, strict=True)):
            positions, after = grid_positions(np.array([*old, *row], dtype=np.int64))
            found[:, i, : len(row)] = positions[:, len(old) :]
            found[:, i, len(row) :] = after
            self._shifts.append(after - len(old) - len(row))
        return found

    def _check_given(self) -> None:
        """Raise BadArtifact if the graph must be given what nobody gives."""
        missing = self._missing.difference(*self._extra.values()) if self._missing else None
        if missing:
            raise BadArtifact(
                f"{self._graph.file} must be given the input {', '.join(sorted(missing))}, of which the "
                "artifact's configuration says nothing. An adapter may bring it, or "
                "Generator.set_model_input of ortlm.genai."
            )

    def _read_logits(self) -> Array:
        """Return the logits of the last run in main memory, in the type that came over."""
        result = self._bound.binding.result(self._logits)
        return self._backend.memory.float32(result) if result.on_device else result.numpy()

    def _bind_logits(self, rows: int | None) -> None:
        """Bind memory for logits [rows, 1, V] once; None lets every run return new memory."""
        info = self._backend.outputs[self._logits]
        vocab = info.shape[2]
        if rows is None or vocab is None:
            self._bound.logits = None
            self._bound.binding.output(self._logits, None, to_host=True)
            return
        bound = self._bound
        if bound.logits_memory is None or bound.logits_memory[0] != rows:
            many = rows > 1 and not self._in_place and info.dtype.name != "fp32"
            if many or self._backend.captures:
                # A device converts many rows in less time than they take to come over, and finds the largest.
                tensor = self._backend.memory.empty((rows, 1, vocab), info.dtype)
            else:
                tensor = self._backend.tensor(np.zeros((rows, 1, vocab), info.dtype.numpy))
            bound.logits_memory = rows, tensor
        tensor = bound.logits_memory[1]
        if bound.logits is not tensor:
            bound.logits = tensor
            bound.binding.output(self._logits, tensor)


def _pad(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows padded on the right as ids int64 [B, S], and their own lengths int64 [B].

    Padding repeats a row's first token: any id that the model knows will do.
    """
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    if len(rows) == 1:
        return np.array(rows, dtype=np.int64), counts
    ids = np.zeros((len(rows), int(counts.max())), dtype=np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
        padded[len(row) :] = row[0]
    return ids, counts
