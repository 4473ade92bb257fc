"""The cache of layers that attend to a window: as large as that and a margin, however long the text is.

GroupQueryAttention with ``sliding_window_cache`` evicts by itself. With a window of W and buffers of C positions,
place i of a row that has T tokens holds position first(T) + i, where

    first(T) = 0 if T <= C, else G · ceil((T - C) / G), with G = C - W + 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import State
from ortlm.dtypes import Array
from ortlm.errors import CannotRewind
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor
from ortlm.runtime.engine.states import (
    Shapes,
    bind_in_place,
    bytes_per_token,
    with_row,
    without_row,
    zero_states,
)

# The operator moves W - 1 positions once for so many tokens: next to nothing, and for the usual windows of 512 and
# more the margin is at most half of the memory.
_SLACK = 256
# As many tokens can be taken back across an eviction; drafts are shorter.
_KEPT = 64


@dataclass(slots=True)
class _Row:
    """What is there of one row: positions ``held`` to ``length``, the buffer beginning at position ``first``.

    ``evicted`` has those before ``first``, [K, first - held, D] of every state. If ``held`` is above ``first``,
    what lies between means nothing. ``broken``: a run that was to evict has not ended.
    """

    length: int = 0
    first: int = 0
    held: int = 0
    evicted: list[Array] = field(default_factory=list)
    broken: bool = False


class WindowCache:
    """One buffer of window and margin per state, [B, K, C, D], read, written and evicted from in place.

    It rewinds as far as it still holds the window before a row's next token, and else raises
    CannotRewind: after a run by one token in any case, by 64 if they came in small steps.
    All states have one window.
    """

    def __init__(
        self,
        backend: Backend,
        states: Sequence[State],
        shapes: Shapes,
        *,
        window: int,
        context_tokens: int,
    ) -> None:
        self._backend = backend
        self._states = states
        self._shapes = shapes
        self._window = window
        # CUDA's operator takes buffers of just the window.
        self._capacity = (
            max(window, min(window + _SLACK, context_tokens)) if backend.memory.is_host else window
        )
        self._step = self._capacity - window + 1
        self._kept = min(_KEPT, self._step - 1)
        self._rows: list[_Row] = []
        self._tensors: list[DeviceTensor] = []
        self._bound: Binding | None = None

    @property
    def length(self) -> int:
        """How many positions the longest row has had, those that were evicted included."""
        return max((row.length for row in self._rows), default=0)

    @property
    def capacity(self) -> int:
        """How many positions the buffers hold."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return len(self._rows) * self._capacity * bytes_per_token(self._backend, self._states, self._shapes)

    def fixed(self, room: int) -> None:
        """Return None: no run of these is captured."""

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``; buffers of that many rows are used again."""
        if rows != len(self._rows):
            self._tensors = zero_states(self._backend, self._states, self._shapes, rows, self._capacity)
            self._bound = None
        self._rows = [_Row() for _ in range(rows)]

    def bind(self, binding: Binding, ends: Sequence[int], room: int) -> None:
        """Bind every buffer for a run after which row i has ``ends[i]`` positions."""
        for number, (row, end) in enumerate(zip(self._rows, ends, strict=True)):
            if self._first(end) > row.first:
                self._keep_evicted(number, self._first(end))
        if self._bound is binding:
            return
        bind_in_place(binding, self._states, self._tensors)
        self._bound = binding

    def advance(self, ends: Sequence[int]) -> None:
        """Take note that the run bound last has filled row i up to ``ends[i]`` positions."""
        for row, end in zip(self._rows, ends, strict=True):
            row.length, row.first, row.broken = end, self._first(end), False

    def reachable(self, lengths: Sequence[int]) -> list[int]:
        """Return ``lengths`` if the windows before them are there; else nothing is, for any row."""
        try:
            for number, (row, length) in enumerate(zip(self._rows, lengths, strict=True)):
                self._check_trim(number, row, length)
        except CannotRewind:
            return [0] * len(lengths)
        return list(lengths)

    def trim(self, lengths: Sequence[int]) -> None:
        """Rewind to ``lengths[i]`` positions in row i.

        Raises CannotRewind, and changes nothing, if the window before a row's next token is not there entirely.
        """
        for number, (row, length) in enumerate(zip(self._rows, lengths, strict=True)):
            self._check_trim(number, row, length)
        for number, (row, length) in enumerate(zip(self._rows, lengths, strict=True)):
            if length == 0:
                self._rows[number] = _Row()
            elif length < row.length:
                if self._first(length) < row.first:
                    self._move_back(number, length)
                row.length = length

    def select(self, rows: NDArray[np.int64], start: int = 0) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken more than once.

        Where a position lies depends on the row's length, so everything is copied, whatever ``start`` is.
        """
        filled = min(self._capacity, self.length)
        if self._backend.memory.move_rows(self._tensors, rows, filled=filled):
            self._bound = None
        self._rows = [replace(self._rows[row]) for row in rows]

    def join(self, arrays: Sequence[Array], length: int) -> None:
        """Add a row after the others; everything is copied."""
        self.fill(with_row(self.read(), arrays), [*(row.length for row in self._rows), length])

    def leave(self, row: int) -> None:
        """Let go of ``row``, whose place the last one takes; everything is copied."""
        self.select(without_row(len(self._rows), row))

    def read(self) -> list[Array]:
        """Return the last positions of every state, [B, K, n, D], n the window or the longest row if that is less.

        A row begins with the oldest of its last n positions. Raises CannotRewind if one of them is gone.
        """
        count = min(self.length, self._window)
        found = []
        for number, row in enumerate(self._rows):
            if row.broken or row.held > max(0, row.length - count):
                raise CannotRewind(f"row {number} of the cache does not hold its last {count} positions.")
        for buffer in self._backend.memory.read(self._tensors, 0, self._capacity):
            new = np.zeros((*buffer.shape[:2], count, buffer.shape[3]), dtype=buffer.dtype)
            for number, row in enumerate(self._rows):
                low = max(0, row.length - count)
                new[number, :, : row.length - low] = buffer[
                    number, :, low - row.first : row.length - row.first
                ]
            found.append(new)
        return found

    def fill(self, arrays: Sequence[Array], lengths: Sequence[int]) -> None:
        """Take what ``read`` returned for rows of ``lengths`` positions in place of what is there."""
        self._rows = []
        self.start(len(lengths))
        count = arrays[0].shape[2]
        for row, length in zip(self._rows, lengths, strict=True):
            row.length, row.first, row.held = length, self._first(length), max(0, length - count)

        def change(i: int, buffer: Array) -> None:
            for number, row in enumerate(self._rows):
                low, high = row.held - row.first, row.length - row.first
                buffer[number, :, low:high] = arrays[i][number, :, : high - low]

        self._edit(change)

    def _first(self, length: int) -> int:
        """Return the position at which the operator lets a row of ``length`` tokens begin."""
        beyond = length - self._capacity
        return 0 if beyond <= 0 else self._step * -(-beyond // self._step)

    def _keep_evicted(self, number: int, first: int) -> None:
        """Copy the last positions that the next run evicts by letting the row begin at ``first``."""
        row = self._rows[number]
        low = max(row.held, row.first, first - self._kept)
        row.evicted = []
        if low < first <= row.length:
            found = self._backend.memory.read(self._tensors, low - row.first, first - row.first, row=number)
            row.evicted = [array[0].copy() for array in found]
            row.held = low
        else:
            row.held = max(row.held, first)
        # A run that is cancelled leaves some layers with what it evicted and others without.
        row.broken = True

    def _check_trim(self, number: int, row: _Row, length: int) -> None:
        if not 0 <= length <= row.length:
            raise CannotRewind(f"the cache holds {row.length} positions and cannot rewind to {length}.")
        # The next token sees itself and the W - 1 positions before it.
        gone = row.held > max(0, length - self._window + 1) and length < row.length
        if length and (row.broken or gone):
            raise CannotRewind(
                f"row {number} of the cache cannot rewind from {row.length} positions to {length}: it holds "
                f"a window of {self._window}, and earlier ones are gone."
            )

    def _move_back(self, number: int, length: int) -> None:
        """Lay the row out as the operator expects it at ``length`` tokens."""
        row, first = self._rows[number], self._first(length)
        shift, count = row.first - first, max(0, length - row.first)

        def change(i: int, buffer: Array) -> None:
            buffer[number, :, shift : shift + count] = buffer[number, :, :count].copy()
            if row.evicted:
                buffer[number, :, row.held - first : shift] = row.evicted[i]

        self._edit(change)
        row.first, row.evicted = first, []

    def _edit(self, change: Callable[[int, Array], None]) -> None:
        if self._backend.memory.edit(self._tensors, change):
            self._bound = None
