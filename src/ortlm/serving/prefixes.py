"""What was computed for earlier requests, for those that begin with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ortlm.dtypes import Array
from ortlm.runtime.engine.token_ids import common_prefix_length

# A shorter beginning is computed in less time than it takes to copy anything.
LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens of a row and its states, as ``Loop.row`` returns them.

    ``adapter`` is the fingerprint of the model with its adapter that computed them, ``long`` whether with the
    rotation table for long texts. The first ``exact`` tokens were computed as those of a prompt, the others one by
    one in an answer, which rounds in another way.
    """

    adapter: str
    long: bool
    tokens: Sequence[int]
    states: Sequence[Array]
    exact: int

    @property
    def nbytes(self) -> int:
        """Size of the states in bytes."""
        return sum(state.nbytes for state in self.states)


class Prefixes:
    """Prefixes of at most ``limit`` bytes together; those that were used least recently go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # The most recently used one is the last.
        self._kept: list[Prefix] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(
        self, ids: Sequence[int], adapter: str, *, long: bool, exact: bool, whole: bool
    ) -> tuple[Prefix | None, int]:
        """Return the prefix that has most of ``ids`` (the last one left out), and how many; (None, 0) for none.

        ``exact``: without what was computed one by one. ``whole``: a prefix counts only if ``ids`` begin with all
        of it, because its states cannot be rewound.
        """
        best, most = None, LEAST_TOKENS - 1
        for kept in self._kept:
            if kept.adapter != adapter or kept.long != long or len(kept.tokens) <= most:
                continue
            # The logits after the last token are wanted, so that one is always computed.
            count = min(common_prefix_length(kept.tokens, ids), len(ids) - 1)
            count = min(count, kept.exact) if exact else count
            if count > most and (count == len(kept.tokens) or not whole):
                best, most = kept, count
        if best is None:
            return None, 0
        self._kept.remove(best)
        self._kept.append(best)
        return best, most

    def keep(self, prefix: Prefix) -> None:
        """Keep ``prefix`` in place of those that it begins with, and forget the oldest beyond the limit."""
        if len(prefix.tokens) < LEAST_TOKENS or prefix.nbytes > self.limit:
            return
        for kept in self._kept:
            if kept.adapter != prefix.adapter or kept.long != prefix.long:
                continue
            common = common_prefix_length(kept.tokens, prefix.tokens)
            if common == len(prefix.tokens) and kept.exact >= prefix.exact:
                # All of it is there already.
                self._kept.remove(kept)
                self._kept.append(kept)
                return
        self._kept = [
            kept
            for kept in self._kept
            if (kept.adapter, kept.long) != (prefix.adapter, prefix.long)
            or common_prefix_length(kept.tokens, prefix.tokens) < len(kept.tokens)
            or kept.exact > prefix.exact
        ]
        self._kept.append(prefix)
        self.nbytes = sum(kept.nbytes for kept in self._kept)
        while self.nbytes > self.limit:
            self.nbytes -= self._kept.pop(0).nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept, self.nbytes = [], 0
