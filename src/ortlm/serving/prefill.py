"""The prefill of one request, in chunks between the steps of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from ortlm.runtime.sampling.logprobs import TokenLogprob, token_logprob
from ortlm.serving.prefixes import Prefix, Snapshot

# Bounds the memory for the logits of all of a chunk's tokens.
_LOGPROB_CHUNK = 64


class Prefill:
    """Feeds ``ids`` to ``loop``, a row of its own, chunk by chunk.

    ``logprobs`` n: collect log-probabilities of the prompt's tokens and of the n most likely in
    ``prompt_logprobs``, one entry per token, the first None. ``cached_tokens`` came from a prefix. ``many``: so
    many tokens, or more, are computed with other weights, see Manifest.prompt_tokens.

    Alone, a loop feeds a prompt in parts of its own size, and kernels for a single token round in another way than
    those for several. So chunks end where those parts do, and none is smaller than that unless the part is: then
    each token is computed as it would be alone, to the last bit where a kernel's result for a row does not depend
    on the others.
    """

    def __init__(
        self, loop: Loop, ids: Sequence[int], *, logprobs: int | None = None, many: int | None = None
    ) -> None:
        self.loop = loop
        self.prompt_logprobs: list[TokenLogprob | None] = [None] if logprobs is not None else []
        self.cached_tokens = 0
        self._ids = ids
        self._top = logprobs
        self._least = max(2, many or 0)
        switch = loop.switch_tokens
        # All positions are rotated by the table of the whole length, from the first chunk on.
        self._first = switch + 1 if switch is not None and len(ids) > switch else 0
        self._at = 0
        infos = loop.states
        # Places of states that no token can be taken out of again, if snapshots say all of an earlier text.
        windows = any(state.window is not None for state in infos)
        self.fixed = [place for place, state in enumerate(infos) if state.fixed]
        self._marks: set[int] = set()
        self._marks_help = bool(self.fixed) and not windows
        self._snapshots: list[Snapshot] = []
        loop.start()

    @property
    def remaining(self) -> int:
        """How many tokens are still to be fed."""
        return len(self._ids) - self._at

    def resume_from(self, prefix: Prefix, count: int) -> None:
        """Take the first ``count`` tokens, at least one fewer than all, from ``prefix``; see ``usable``."""
        states, tokens = prefix.states, prefix.tokens
        if all(state.window is None for state in self.loop.states):
            # No more is copied than is used.
            states, tokens = prefix.states_at(count), tokens[:count]
        self.loop.adopt([list(tokens)], states)
        self.loop.trim(count)
        self._at = self.cached_tokens = count

    def mark(self, count: int) -> bool:
        """Ask for a snapshot near the end of the first ``count`` tokens; return whether there will be one."""
        count = self.usable(count)
        if count not in self._marks and (not self._marks_help or count <= self._at):
            return False
        self._marks.add(count)
        return True

    def snapshots(self) -> list[Snapshot]:
        """Return what states of one size were on the way: where that was asked for, and at ends of some chunks.

        To be called when all tokens were fed. The memory is the loop's own, which must not run again.
        """
        if not self._marks_help:
            return []
        return [*(Snapshot(length, states) for length, states in self.loop.checkpoints()), *self._snapshots]

    def step(self, chunk_tokens: int) -> NDArray[np.float32] | None:
        """Feed the next ``chunk_tokens``; return the logits float32 [V] after the last token once all are fed."""
        size = max(self._size(chunk_tokens), self._first - self._at)
        part = list(self._ids[self._at : self._at + size])
        if self._top is None:
            logits = self.loop.append([part])[0]
        else:
            every = self.loop.append([part], keep=len(part))[0]
            following = self._ids[self._at + 1 : self._at + len(part) + 1]
            for row, token in zip(every, following, strict=False):
                # An image's tokens are no words that the model could have chosen.
                found = token_logprob(row, token, self._top) if token < FIRST_IMAGE_TOKEN else None
                self.prompt_logprobs.append(found)
            logits = every[-1]
        self._at += len(part)
        if self._at in self._marks:
            states = self.loop.row(0)
            # Later chunks write to this memory again.
            kept = [states[place].copy() for place in self.fixed]
            self._snapshots.append(Snapshot(self._at, kept, shared=True))
        return None if self.remaining else logits

    @property
    def exact_tokens(self) -> int:
        """How many of the first tokens any longer prompt would compute in the same way."""
        tail = len(self._ids) % self.loop.chunk_tokens
        # Rows are computed in pairs, and the last one of an odd number by itself.
        return self._even(len(self._ids) - tail if tail < self._least else len(self._ids))

    def usable(self, count: int) -> int:
        """Return how many of ``count`` tokens to take from a prefix, so that the others are computed as alone."""
        count = self._even(count)
        begun = count % self.loop.chunk_tokens
        start = count - begun
        end = min(len(self._ids), start + self.loop.chunk_tokens)
        return count if not begun or end - count >= self._least else max(start, self._even(end - self._least))

    def _size(self, chunk_tokens: int) -> int:
        if self._top is not None:
            return _LOGPROB_CHUNK
        left = min(self.remaining, self.loop.chunk_tokens - self._at % self.loop.chunk_tokens)
        size = min(max(chunk_tokens, self._least), left)
        size = left if left - size < self._least else size
        marked = [mark - self._at for mark in self._marks if self._least <= mark - self._at < size]
        return min(marked, default=size)

    def _even(self, count: int) -> int:
        """Return ``count`` or one less, so that pairs of rows stay pairs; states of one size cannot be cut."""
        return count if self.fixed else count - count % 2
