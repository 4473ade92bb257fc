"""States that stand for a whole text in one size: of convolutions, and of recurrent layers.

No token can be taken out of such a state again. So each run writes to other memory than it reads, which keeps what
was there before, and some earlier states are kept as checkpoints: rewinding goes to one of those, and what follows
it is fed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import State
from ortlm.dtypes import Array
from ortlm.errors import BadOption, CannotRewind
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor
from ortlm.runtime.engine.states import Shapes, without_row

# So many checkpoints at most, of so many bytes together: half of them near the end of the text.
_MOST, _MOST_BYTES = 8, 256 << 20
# While tokens come one by one, a checkpoint is kept every so many.
_EVERY = 256


@dataclass(slots=True)
class _Checkpoint:
    """States as they were when row i had ``lengths[i]`` tokens, -1 if it has had others since.

    Row i lies in row ``rows[i]`` of the tensors. ``long``: what came before was a run of several tokens.
    """

    tensors: list[DeviceTensor]
    lengths: list[int]
    rows: list[int]
    long: bool

    def cut(self, lengths: Sequence[int]) -> bool:
        """Forget rows that were longer than ``lengths``; returns whether one remains."""
        self.lengths = [-1 if own > most else own for own, most in zip(self.lengths, lengths, strict=True)]
        return any(own > 0 for own in self.lengths)


class FixedStateCache:
    """All states of one size, [B, ...] each, read from one buffer and written to another by turns.

    It rewinds to where it was before the last run, to nothing, and to checkpoints: the ends of prompts and of
    their chunks, and every 256th token; of those, eight that lie closer together towards the end.
    """

    def __init__(self, backend: Backend, states: Sequence[State], shapes: Shapes) -> None:
        if not backend.memory.is_host:
            raise BadOption(
                "this model has convolutional or recurrent states, which are kept in main memory only. Run it on "
                "the CPU (device='cpu')."
            )
        self._backend, self._states, self._shapes = backend, states, shapes
        self._now = _Checkpoint([], [], [], long=False)
        self._before: _Checkpoint | None = None
        self._kept: list[_Checkpoint] = []
        # What the next run writes to.
        self._next: list[DeviceTensor] = []

    @property
    def length(self) -> int:
        """How many tokens the longest row has had."""
        return max(self._now.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes, those of checkpoints included."""
        before = self._before.tensors if self._before else []
        held = (self._now.tensors, before, self._next, *(point.tensors for point in self._kept))
        return sum(tensor.numpy().nbytes for tensors in held for tensor in tensors)

    def fixed(self, room: int) -> None:
        """Return None: each run writes to other memory than it reads."""

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``; buffers of that many rows are used again."""
        if rows == len(self._now.lengths) and self._now.tensors:
            for tensor in self._now.tensors:
                tensor.numpy()[...] = 0
            tensors = self._now.tensors
        else:
            tensors, self._next = self._zeros(rows), []
        self._set(tensors, [0] * rows)

    def bind(self, binding: Binding, ends: Sequence[int], room: int) -> None:
        """Bind what is there as past, and the other buffers as present."""
        if not self._next:
            self._next = self._zeros(len(self._now.lengths))
        for state, past, present in zip(self._states, self._now.tensors, self._next, strict=True):
            binding.input(state.past, past)
            binding.output(state.present, present)

    def advance(self, ends: Sequence[int]) -> None:
        """Take note that the run bound last has filled row i up to ``ends[i]`` positions."""
        gone, self._before = self._before, self._now
        long = max((end - own for end, own in zip(ends, self._now.lengths, strict=True)), default=0) > 1
        self._now = _Checkpoint(self._next, list(ends), list(range(len(ends))), long)
        self._next = []
        if gone is not None and not self._keep(gone) and len(gone.tensors[0].numpy()) == len(ends):
            self._next = gone.tensors

    def reachable(self, lengths: Sequence[int]) -> list[int]:
        """Return the largest length of each row, at most that of ``lengths``, which ``trim`` reaches."""
        points = self._points()
        return [
            max((0, *(point.lengths[row] for point in points if point.lengths[row] <= most)))
            for row, most in enumerate(lengths)
        ]

    def checkpoints(self) -> list[tuple[int, list[Array]]]:
        """Return how many tokens the first row had at each of its checkpoints, and its states then, [1, ...].

        The shortest comes first. They are the memory itself, which is written again only if the cache is used on.
        """
        found = {point.lengths[0]: point for point in self._points()[1:]}
        return [
            (length, [tensor.numpy()[point.rows[0] : point.rows[0] + 1] for tensor in point.tensors])
            for length, point in sorted(found.items())
            if 0 < length < self._now.lengths[0]
        ]

    def trim(self, lengths: Sequence[int]) -> None:
        """Rewind to ``lengths[i]`` positions in row i.

        Raises CannotRewind, and changes nothing, if there is no such state.
        """
        for row, (wanted, found) in enumerate(zip(lengths, self.reachable(lengths), strict=True)):
            if wanted != found:
                raise CannotRewind(
                    f"row {row} of the cache cannot rewind from {self._now.lengths[row]} positions to {wanted}: "
                    f"its states are kept as they were at {found}."
                )
        if list(lengths) == self._now.lengths:
            return
        before = self._before
        if before is not None and list(lengths) == before.lengths:
            self._rewind_to(before)
        else:
            for row, wanted in enumerate(lengths):
                if wanted < self._now.lengths[row]:
                    self._restore(row, wanted)
        self._now.lengths = list(lengths)
        self._kept = [point for point in self._kept if point.cut(lengths)]
        if self._before is not None and not self._before.cut(lengths):
            self._before = None

    def select(self, rows: NDArray[np.int64], start: int = 0) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken more than once."""
        wanted = rows.tolist()
        if wanted == list(range(len(self._now.lengths))):
            return
        for point in self._points():
            point.lengths = [point.lengths[row] for row in wanted]
            # Checkpoints stay where they are: few are ever needed.
            point.rows = [point.rows[row] for row in wanted]
        now = self._now
        arrays = [tensor.numpy()[now.rows] for tensor in now.tensors]
        now.tensors = [self._backend.memory.put(array) for array in arrays]
        now.rows = list(range(len(wanted)))
        if self._next and len(self._next[0].numpy()) != len(wanted):
            self._next = []

    def join(self, arrays: Sequence[Array], length: int) -> None:
        """Add a row after the others; everything is copied, and checkpoints are given up."""
        lengths = [*self._now.lengths, length]
        self.fill([np.concatenate(pair) for pair in zip(self.read(), arrays, strict=True)], lengths)

    def leave(self, row: int) -> None:
        """Let go of ``row``, whose place the last one takes."""
        self.select(without_row(len(self._now.lengths), row))

    def read(self) -> list[Array]:
        """Return every state, [B, ...]: the memory itself."""
        return [tensor.numpy() for tensor in self._now.tensors]

    def fill(self, arrays: Sequence[Array], lengths: Sequence[int]) -> None:
        """Take states [B, ...] of rows of ``lengths`` tokens in place of what is there."""
        self._next = []
        copies = [self._backend.memory.put(np.array(array, order="C")) for array in arrays]
        self._set(copies, list(lengths))

    def _set(self, tensors: list[DeviceTensor], lengths: list[int]) -> None:
        self._now = _Checkpoint(tensors, lengths, list(range(len(lengths))), long=True)
        self._before, self._kept = None, []

    def _zeros(self, rows: int) -> list[DeviceTensor]:
        kinds = [self._backend.inputs[state.past].dtype for state in self._states]
        return self._backend.memory.zeros([(rows, *shape) for shape in self._shapes], kinds)

    def _points(self) -> list[_Checkpoint]:
        return [self._now, *([self._before] if self._before else []), *self._kept]

    def _rewind_to(self, before: _Checkpoint) -> None:
        """Take the states before the last run, all rows of them, in place of those after it."""
        if before.rows == list(range(len(before.lengths))) == list(range(len(before.tensors[0].numpy()))):
            self._next, self._now, self._before = self._now.tensors, before, None
            return
        for row, wanted in enumerate(before.lengths):
            self._restore(row, wanted)

    def _restore(self, row: int, length: int) -> None:
        """Copy the states of ``row`` at ``length`` tokens to where the next run reads."""
        point = next((p for p in self._points()[1:] if p.lengths[row] == length), None)
        for i, tensor in enumerate(self._now.tensors):
            tensor.numpy()[row] = 0 if point is None else point.tensors[i].numpy()[point.rows[row]]

    def _keep(self, point: _Checkpoint) -> bool:
        """Keep ``point`` if it may be needed; of too many, drop the one that is least so."""
        place = max(point.lengths)
        last = max(self._kept[-1].lengths) if self._kept else 0
        if place <= 0 or not (point.long or place - last >= _EVERY):
            return False
        self._kept.append(point)
        size = sum(tensor.numpy().nbytes for tensor in point.tensors)
        most = max(2, min(_MOST, _MOST_BYTES // max(1, size)))
        while len(self._kept) > most:
            places = [0, *(max(kept.lengths) for kept in self._kept)]
            end = self.length + 1
            # How many times further from the end the one before it is than the one after it.
            room = [(end - places[i - 1]) / (end - places[i + 1]) for i in range(1, len(places) - 1)]
            self._kept.pop(int(np.argmin(room)))
        return True
