"""What was computed for earlier requests, for those that begin with the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ortlm.dtypes import Array
from ortlm.runtime.engine.token_ids import common_prefix_length

# A shorter beginning is computed in less time than it takes to copy anything.
LEAST_TOKENS = 16
# Of one prefix, its end not counted. Each may take some MB.
_MOST_SNAPSHOTS = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The states of one size as they were after ``length`` tokens, [1, ...] each.

    ``shared``: another text ended there or went on in another way, and more may do so.
    """

    length: int
    states: Sequence[Array]
    shared: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the states in bytes."""
        return sum(state.nbytes for state in self.states)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens of a row and its states, as ``Loop.row`` returns them.

    ``adapter`` is the fingerprint of the model with its adapter that computed them, ``long`` whether with the
    rotation table for long texts. The first ``exact`` tokens were computed as those of a prompt, the others one by
    one in an answer, which rounds in another way.

    No token can be taken out of states of one size, whose places among the states are ``fixed``. If there are any,
    a text resumes from the end of the tokens or from one of the ``snapshots``, which are before it, the shortest
    first.
    """

    adapter: str
    long: bool
    tokens: Sequence[int]
    states: Sequence[Array]
    exact: int
    fixed: Sequence[int] = ()
    snapshots: Sequence[Snapshot] = ()

    @property
    def nbytes(self) -> int:
        """Size of the states in bytes, those of snapshots included."""
        return sum(state.nbytes for state in self.states) + sum(one.nbytes for one in self.snapshots)

    def resumable(self, most: int, usable: Callable[[int], int]) -> int:
        """Return the largest number of tokens up to ``most`` that ``usable`` accepts and states are there for."""
        if not self.fixed:
            return usable(most)
        lengths = [len(self.tokens), *(one.length for one in self.snapshots)]
        return max((n for n in lengths if n <= most and usable(n) == n), default=0)

    def states_at(self, length: int) -> Sequence[Array]:
        """Return the states after the first ``length`` tokens, one of those that ``resumable`` returns."""
        if length == len(self.tokens):
            return self.states
        found = next((one for one in self.snapshots if one.length == length), None)
        fixed = {} if found is None else dict(zip(self.fixed, found.states, strict=True))
        return [fixed.get(place, state[:, :, :length]) for place, state in enumerate(self.states)]

    def with_snapshots(self, more: Iterable[Snapshot]) -> Prefix:
        """Return this with ``more`` of its own snapshots, of which those are kept that are most likely needed."""
        if not self.fixed:
            return self
        found: dict[int, Snapshot] = {}
        for one in (*self.snapshots, *more):
            if one.length < len(self.tokens) and not (one.length in found and found[one.length].shared):
                found[one.length] = one
        kept = [found[length] for length in sorted(found)]
        while len(kept) > _MOST_SNAPSHOTS:
            kept.remove(self._least_needed(kept))
        return replace(self, snapshots=tuple(kept))

    def within(self, limit: int) -> Prefix:
        """Return this with as many snapshots as fit into ``limit`` bytes."""
        kept = list(self.snapshots)
        while kept and replace(self, snapshots=kept).nbytes > limit:
            kept.remove(self._least_needed(kept))
        return self if len(kept) == len(self.snapshots) else replace(self, snapshots=tuple(kept))

    def end(self) -> Snapshot:
        """Return the states of one size at the end of the tokens."""
        return Snapshot(len(self.tokens), [self.states[place] for place in self.fixed], shared=True)

    def _least_needed(self, snapshots: Sequence[Snapshot]) -> Snapshot:
        """Return the snapshot without which the fewest tokens have to be computed again."""
        places = [0, *(one.length for one in snapshots), len(self.tokens)]
        end = len(self.tokens) + 1

        def need(at: int) -> tuple[bool, float]:
            # How many times further from the end the one before it is than the one after it.
            return snapshots[at].shared, (end - places[at]) / (end - places[at + 2])

        return snapshots[min(range(len(snapshots)), key=need)]


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
        self, ids: Sequence[int], adapter: str, *, long: bool, exact: bool, usable: Callable[[int], int]
    ) -> tuple[Prefix | None, int, int]:
        """Return the prefix from which most of ``ids`` can be resumed, how many, and how many any one has of them.

        (None, 0, ...) if there is none. The last one of ``ids`` is left out. ``exact``: without what was computed
        one by one. ``usable`` says of a number of tokens how many of them may be taken.
        """
        best, most, longest = None, LEAST_TOKENS - 1, 0
        for kept in self._kept:
            if kept.adapter != adapter or kept.long != long or len(kept.tokens) <= most:
                continue
            # The logits after the last token are wanted, so that one is always computed.
            count = min(common_prefix_length(kept.tokens, ids), len(ids) - 1)
            longest = max(longest, count)
            count = kept.resumable(min(count, kept.exact) if exact else count, usable)
            if count > most:
                best, most = kept, count
        if best is None:
            return None, 0, longest
        self._kept.remove(best)
        self._kept.append(best)
        return best, most, longest

    def keep(self, prefix: Prefix) -> None:
        """Keep ``prefix`` in place of those that it begins with, and forget the oldest beyond the limit.

        What was replaced, or is part of another one, remains as a snapshot if its states cannot be rewound to.
        """
        if len(prefix.tokens) < LEAST_TOKENS:
            return
        others: list[Prefix] = []
        for kept in self._kept:
            common = common_prefix_length(kept.tokens, prefix.tokens)
            if (kept.adapter, kept.long) != (prefix.adapter, prefix.long):
                others.append(kept)
            elif common == len(prefix.tokens) and kept.exact >= prefix.exact:
                # All of it is there already.
                self._kept.remove(kept)
                self._put(kept.with_snapshots([*prefix.snapshots, prefix.end()]))
                return
            elif common == len(kept.tokens) and kept.exact <= prefix.exact:
                prefix = prefix.with_snapshots([*kept.snapshots, kept.end()])
            else:
                others.append(kept)
        fitting = prefix.within(self.limit)
        if fitting.nbytes <= self.limit:
            self._kept = others
            self._put(fitting)

    def _put(self, prefix: Prefix) -> None:
        self._kept.append(prefix.within(self.limit))
        self.nbytes = sum(kept.nbytes for kept in self._kept)
        while self.nbytes > self.limit:
            self.nbytes -= self._kept.pop(0).nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept, self.nbytes = [], 0
