"""Key/value caches: what a graph carries from step to step.

A cache's kind comes from the artifact's manifest (``State.kind``), never from a look at the model.
Tensors have shape [B, K, C, D] with the positions on axis 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import Graph, State
from ortlm.dtypes import Array, DType
from ortlm.errors import BadArtifact, CannotRewind, nearest
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor
from ortlm.runtime.engine.captured_steps import StatePool, StepStates
from ortlm.runtime.engine.fixed_state_cache import FixedStateCache
from ortlm.runtime.engine.sliding_window_cache import WindowCache
from ortlm.runtime.engine.states import (
    FIXED_KINDS,
    Shapes,
    bind_in_place,
    bytes_per_token,
    with_row,
    without_row,
    zero_states,
)

RowIndices = NDArray[np.int64]
_GRAIN = 256


@dataclass(frozen=True, slots=True)
class StateInfo:
    """Name, element type and window (None: all positions) of one state.

    ``sizes`` are its key/value heads K and width D, or all sizes after the batch if it is ``fixed``.
    """

    name: str
    dtype: DType
    sizes: tuple[int, ...]
    window: int | None = None
    fixed: bool = False

    def shape(self, rows: int, longest: int) -> tuple[int, ...]:
        """Return the shape of what ``Cache.read`` gives for ``rows``, of which one has ``longest`` tokens."""
        if self.fixed:
            return (rows, *self.sizes)
        heads, width = self.sizes
        return rows, heads, longest if self.window is None else min(longest, self.window), width


class Cache(Protocol):
    """The states of all layers for a batch of rows."""

    @property
    def length(self) -> int:
        """How many positions are filled, in the longest row."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""

    def fixed(self, room: int) -> StepStates | None:
        """Return all states, with room for ``room`` positions, if they stay where they are from step to step."""

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``."""

    def bind(self, binding: Binding, ends: Sequence[int], room: int) -> None:
        """Bind every state for a run after which row i has ``ends[i]`` positions.

        ``room`` is how many positions the longest row will have before long, padding included.
        """

    def advance(self, ends: Sequence[int]) -> None:
        """Take note that the run bound last has filled row i up to ``ends[i]`` positions."""

    def reachable(self, lengths: Sequence[int]) -> list[int]:
        """Return how far ``trim`` can go for each row: to ``lengths[i]``, or else to the nearest below.

        All are 0 if everything has to be fed again.
        """

    def trim(self, lengths: Sequence[int]) -> None:
        """Rewind to ``lengths[i]`` positions in row i.

        Raises CannotRewind, and changes nothing, if that is more than there are, or if some of them are gone.
        """

    def select(self, rows: RowIndices, start: int = 0) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken more than once.

        ``start``: if there are as many rows as before, those that move agree with the rows in whose place they
        come in so many first positions, which then need not be copied.
        """

    def join(self, arrays: Sequence[Array], length: int) -> None:
        """Add a row of ``length`` positions after the others: what ``read`` returned of it where it was alone."""

    def leave(self, row: int) -> None:
        """Let go of ``row``, whose place the last one takes. At least one row must be left."""

    def read(self) -> list[Array]:
        """Return what is filled of every state, [B, K, length, D]: copies, or parts of the memory itself.

        Of a state with a window the last positions of each row, see WindowCache; of one that has one size, all.
        """

    def fill(self, arrays: Sequence[Array], lengths: Sequence[int]) -> None:
        """Take the states that ``read`` has returned for rows of these lengths in place of what is there."""


class SharedCache:
    """One buffer per state, read and written in place, grown on demand.

    The buffers hold at least 128 positions more than asked for, in multiples of 256, and grow by at least
    half; they stay within ``context_tokens`` unless a run itself asks for more room.
    """

    def __init__(
        self,
        backend: Backend,
        states: Sequence[State],
        shapes: Shapes,
        context_tokens: int,
        pool: StatePool | None = None,
    ) -> None:
        self._backend = backend
        self._states = states
        self._shapes = shapes
        self._context = context_tokens
        self._pool = pool
        self._rows = 0
        self._length = 0
        self._capacity = 0
        self._tensors: list[DeviceTensor] = []
        # Buffers of more rows than are used, of which the tensors are the first; none if they are the same.
        self._spare: list[Array] = []
        # What is to be returned to the pool.
        self._fixed: StepStates | None = None
        self._bound: Binding | None = None

    def __del__(self) -> None:
        self._give_back()

    @property
    def length(self) -> int:
        """How many positions are filled, in the longest row."""
        return self._length

    def fixed(self, room: int) -> StepStates | None:
        """Return all states, with room for ``room`` positions, if they stay where they are from step to step."""
        if self._pool is not None and room > self._capacity:
            self._grow(room)
        return self._fixed

    @property
    def capacity(self) -> int:
        """How many positions the buffers hold."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return self._rows * self._capacity * bytes_per_token(self._backend, self._states, self._shapes)

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``; buffers of that many rows are used again."""
        if rows != self._rows:
            self._give_back()
            self._rows, self._capacity, self._tensors, self._bound = rows, 0, [], None
            self._spare = []
        self._length = 0

    def bind(self, binding: Binding, ends: Sequence[int], room: int) -> None:
        """Bind every buffer as past and as present; nothing happens if that is so already."""
        if room > self._capacity:
            self._grow(room)
        if self._bound is binding:
            return
        self._bound = binding
        if self._fixed is not None and self._fixed.binds(binding):
            return
        bind_in_place(binding, self._states, self._tensors)

    def advance(self, ends: Sequence[int]) -> None:
        """Take note that the run bound last has filled row i up to ``ends[i]`` positions."""
        self._length = max(ends)

    def reachable(self, lengths: Sequence[int]) -> list[int]:
        """Return ``lengths``: all positions are there."""
        return list(lengths)

    def trim(self, lengths: Sequence[int]) -> None:
        """Rewind to ``lengths[i]`` positions; what lies after them is ignored and overwritten later."""
        self._length = _trimmed(self._length, lengths)

    def select(self, rows: RowIndices, start: int = 0) -> None:
        """Keep the rows with these numbers, in this order."""
        if self._backend.memory.move_rows(self._tensors, rows, start=start, filled=self._length):
            self._bound = None
            self._spare = []
            self._give_back()
        self._rows = len(rows)

    def join(self, arrays: Sequence[Array], length: int) -> None:
        """Add a row after the others: into the buffers if they have room, which doubles whenever it ends."""
        if not self._in_place:
            self.fill(with_row(self.read(), arrays), [])
            return
        if length > self._capacity:
            self._grow(length)
        rows = self._rows + 1
        if not self._spare or len(self._spare[0]) < rows:
            self._spare = []
            for at, tensor in enumerate(self._tensors):
                old = tensor.numpy()
                new = np.zeros((2 * self._rows, *old.shape[1:]), old.dtype)
                new[: self._rows, :, : self._length] = old[:, :, : self._length]
                self._spare.append(new)
                # So that only one state is there twice.
                self._tensors[at] = self._backend.memory.put(new)
        self._show(rows)
        for tensor, array in zip(self._tensors, arrays, strict=True):
            tensor.numpy()[-1, :, :length] = array[0, :, :length]
        self._length = max(self._length, length)

    def leave(self, row: int) -> None:
        """Let go of ``row``, whose place the last one takes; its memory is kept for a row to come."""
        last = self._rows - 1
        if not self._in_place:
            self.select(without_row(self._rows, row))
            return
        if not self._spare:
            self._spare = [tensor.numpy() for tensor in self._tensors]
        if row != last:
            for buffer in self._spare:
                buffer[row, :, : self._length] = buffer[last, :, : self._length]
        self._show(last)

    @property
    def _in_place(self) -> bool:
        """Whether single rows can be written, because the buffers lie in main memory."""
        return self._pool is None and self._backend.memory.is_host

    def _show(self, rows: int) -> None:
        """Let runs read and write the first ``rows`` rows of the spare buffers."""
        self._tensors = [self._backend.memory.put(buffer[:rows]) for buffer in self._spare]
        self._rows, self._bound = rows, None

    def read(self) -> list[Array]:
        """Return what is filled of every state, [B, K, length, D]."""
        return self._backend.memory.read(self._tensors, 0, self._length)

    def fill(self, arrays: Sequence[Array], lengths: Sequence[int]) -> None:
        """Take states [B, K, length, D] in place of what is there."""
        memory = self._backend.memory
        self._give_back()
        self._rows, _, self._length, _ = arrays[0].shape
        self._capacity = self._capacity_for(self._length, 0)
        self._tensors, self._spare = [], []
        for array in arrays:
            new = [memory.put(np.ascontiguousarray(array))]
            memory.resize(new, self._length, self._capacity)
            self._tensors += new
        self._bound = None

    def _grow(self, room: int) -> None:
        memory, pool, wanted = (
            self._backend.memory,
            self._pool,
            self._capacity_for(room, self._capacity),
        )
        self._bound, self._spare = None, []
        if self._tensors and self._length:
            old = pool.old(self._rows, wanted, most=self._most(room)) if pool is not None else None
            if old is not None:
                memory.resize(self._tensors, self._length, old.capacity, into=old.tensors)
                self._give_back()
                self._capacity, self._fixed = old.capacity, old
                return
            if pool is not None:
                # So that there are never two caches.
                self._give_back()
                pool.clear()
            memory.resize(self._tensors, self._length, wanted)
            self._capacity = wanted
            if pool is not None:
                self._fixed = StepStates(list(self._tensors), self._rows, wanted, pool)
            return
        self._give_back()

        def make() -> list[DeviceTensor]:
            return zero_states(self._backend, self._states, self._shapes, self._rows, wanted)

        if pool is None:
            self._capacity, self._tensors = wanted, make()
            return
        self._fixed = pool.take(self._rows, wanted, make, most=self._most(room))
        self._capacity, self._tensors = self._fixed.capacity, list(self._fixed.tensors)

    def _give_back(self) -> None:
        """Leave the states to whoever needs some next."""
        fixed, self._fixed = self._fixed, None
        if fixed is not None and self._pool is not None:
            self._pool.give(fixed)

    def _most(self, room: int) -> int:
        return max(room, self._context)

    def _capacity_for(self, room: int, old: int) -> int:
        # Room for an answer too: growing on its first token would copy the whole prompt's cache.
        wanted = max(room + _GRAIN // 2, old + old // 2)
        rounded = -(-wanted // _GRAIN) * _GRAIN
        return max(room, min(rounded, self._context))


class AppendCache:
    """A new tensor per state and step: what a run returns as present is the next run's past."""

    _axis = 2

    def __init__(self, backend: Backend, states: Sequence[State], shapes: Shapes) -> None:
        self._backend = backend
        self._states = states
        self._shapes = shapes
        self._rows = 0
        self._length = 0
        self._tensors: list[DeviceTensor] = []
        self._bound: Binding | None = None

    @property
    def length(self) -> int:
        """How many positions are filled, in the longest row."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self._rows * self._length * bytes_per_token(self._backend, self._states, self._shapes)

    def fixed(self, room: int) -> None:
        """Return None: the states are others after every step."""

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``."""
        self._rows, self._length, self._bound = rows, 0, None
        self._tensors = []
        for state, (heads, width) in zip(self._states, self._shapes, strict=True):
            empty = np.zeros((rows, heads, 0, width), self._backend.inputs[state.past].dtype.numpy)
            self._tensors.append(self._backend.tensor(self._as_fed(empty)))

    def bind(self, binding: Binding, ends: Sequence[int], room: int) -> None:
        """Bind what the last run returned as past, and new memory as present."""
        for state, tensor in zip(self._states, self._tensors, strict=True):
            binding.input(state.past, tensor)
            binding.output(state.present, None)
        self._bound = binding

    def advance(self, ends: Sequence[int]) -> None:
        """Take over the tensors that the run bound last has returned."""
        assert self._bound is not None
        self._tensors = [self._bound.result(state.present) for state in self._states]
        self._length = max(ends)

    def reachable(self, lengths: Sequence[int]) -> list[int]:
        """Return ``lengths``: all positions are there."""
        return list(lengths)

    def trim(self, lengths: Sequence[int]) -> None:
        """Rewind to ``lengths[i]`` positions by copying what remains of the longest row."""
        length = _trimmed(self._length, lengths)
        if length == 0:
            self.start(self._rows)
        elif length < self._length:
            self._backend.memory.resize(self._tensors, length, length, axis=self._axis)
            self._length = length

    def select(self, rows: RowIndices, start: int = 0) -> None:
        """Keep the rows with these numbers, in this order."""
        if self._length == 0:
            self.start(len(rows))
        elif not np.array_equal(rows, np.arange(self._rows)):
            self._backend.memory.take_rows(self._tensors, rows, filled=self._length, axis=self._axis)
            self._rows = len(rows)

    def join(self, arrays: Sequence[Array], length: int) -> None:
        """Add a row after the others; everything is copied."""
        self.fill(with_row(self.read(), arrays), [])

    def leave(self, row: int) -> None:
        """Let go of ``row``, whose place the last one takes; everything is copied."""
        self.select(without_row(self._rows, row))

    def read(self) -> list[Array]:
        """Return every state, [B, K, length, D]."""
        found = self._backend.memory.read(self._tensors, 0, self._length, axis=self._axis)
        return [self._as_read(array) for array in found]

    def fill(self, arrays: Sequence[Array], lengths: Sequence[int]) -> None:
        """Take states [B, K, length, D] in place of what is there."""
        self._rows, _, self._length, _ = arrays[0].shape
        self._tensors = [
            self._backend.memory.put(np.ascontiguousarray(self._as_fed(array))) for array in arrays
        ]
        self._bound = None

    def _as_fed(self, array: Array) -> Array:
        """Return a state [B, K, length, D] in the form that graphs read."""
        return array

    def _as_read(self, array: Array) -> Array:
        """Undo ``_as_fed``."""
        return array


class CombinedCache(AppendCache):
    """An AppendCache of graphs that keep keys and values in one tensor [2, B, K, C, D], as GPT-2's exports do.

    For the others it is one state of twice the heads.
    """

    _axis = 3

    def _as_fed(self, array: Array) -> Array:
        rows, heads, length, width = array.shape
        return np.ascontiguousarray(array.reshape(rows, 2, heads // 2, length, width).swapaxes(0, 1))

    def _as_read(self, array: Array) -> Array:
        array = array.swapaxes(0, 1)
        return array.reshape(len(array), -1, *array.shape[3:])


class SplitCache:
    """Several caches side by side, each for some of the states, whose numbers in their order are ``places``."""

    def __init__(self, parts: Sequence[tuple[Cache, Sequence[int]]]) -> None:
        self.parts = [part for part, _ in parts]
        self._places = [places for _, places in parts]

    @property
    def length(self) -> int:
        """How many positions are filled, in the longest row."""
        return self.parts[0].length

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(part.nbytes for part in self.parts)

    def fixed(self, room: int) -> None:
        """Return None: some of the states may be others after every step."""

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``."""
        for part in self.parts:
            part.start(rows)

    def bind(self, binding: Binding, ends: Sequence[int], room: int) -> None:
        """Bind every state for a run after which row i has ``ends[i]`` positions."""
        for part in self.parts:
            part.bind(binding, ends, room)

    def advance(self, ends: Sequence[int]) -> None:
        """Take note that the run bound last has filled row i up to ``ends[i]`` positions."""
        for part in self.parts:
            part.advance(ends)

    def reachable(self, lengths: Sequence[int]) -> list[int]:
        """Return how far all parts can go together."""
        found = list(lengths)
        while True:
            before = found
            for part in self.parts:
                found = part.reachable(found)
            if found == before:
                return found

    def trim(self, lengths: Sequence[int]) -> None:
        """Rewind in every part; those that may have to refuse come first."""
        for part in self.parts:
            part.trim(lengths)

    def select(self, rows: RowIndices, start: int = 0) -> None:
        """Keep the rows with these numbers, in this order."""
        for part in self.parts:
            part.select(rows, start)

    def join(self, arrays: Sequence[Array], length: int) -> None:
        """Add a row after the others in every part."""
        for part, places in zip(self.parts, self._places, strict=True):
            part.join([arrays[place] for place in places], length)

    def leave(self, row: int) -> None:
        """Let go of ``row`` in every part."""
        for part in self.parts:
            part.leave(row)

    def read(self) -> list[Array]:
        """Return what every part returns, in the order of the states."""
        found: dict[int, Array] = {}
        for part, places in zip(self.parts, self._places, strict=True):
            found |= zip(places, part.read(), strict=True)
        return [found[place] for place in sorted(found)]

    def fill(self, arrays: Sequence[Array], lengths: Sequence[int]) -> None:
        """Take the states that ``read`` has returned in place of what is there."""
        for part, places in zip(self.parts, self._places, strict=True):
            part.fill([arrays[place] for place in places], lengths)


def make_cache(
    backend: Backend,
    graph: Graph,
    *,
    context_tokens: int,
    shapes: Shapes | None = None,
    pool: StatePool | None = None,
) -> Cache:
    """Return the cache that fits the kind of ``graph``'s states. Raises BadArtifact for an unknown kind.

    States that are used again come from ``pool``, if there is one.
    """
    for state in graph.states:
        if state.past not in backend.inputs or state.present not in backend.outputs:
            raise BadArtifact(
                f"{graph.file} has no input {state.past} with output {state.present}, "
                "but the artifact's configuration names them."
            )
        if state.axis != 2 and (state.axis, state.kind) != (3, "append"):
            raise BadArtifact(
                f"{graph.file}: state {state.past} of kind {state.kind!r} grows along axis {state.axis}; known "
                "are 2, and 3 for the kind 'append'."
            )
    shapes = state_shapes(backend, graph) if shapes is None else shapes
    parts: dict[tuple[str, int], list[int]] = {}
    for place, state in enumerate(graph.states):
        kind = "combined" if state.axis == 3 else "fixed" if state.kind in FIXED_KINDS else state.kind
        parts.setdefault((kind, state.window or 0), []).append(place)
    # These may refuse to rewind, and must be asked first.
    ordered = sorted(parts.items(), key=lambda part: part[0][0] not in ("window", "fixed"))
    made: list[tuple[Cache, Sequence[int]]] = []
    for (kind, window), places in ordered:
        states, sizes = [graph.states[i] for i in places], [shapes[i] for i in places]
        if kind == "window" and window > 0:
            made.append(
                (WindowCache(backend, states, sizes, window=window, context_tokens=context_tokens), places)
            )
        elif kind == "grow":
            made.append((SharedCache(backend, states, sizes, context_tokens, pool), places))
        elif kind == "fixed":
            made.append((FixedStateCache(backend, states, sizes), places))
        elif kind == "append":
            made.append((AppendCache(backend, states, sizes), places))
        elif kind == "combined":
            made.append((CombinedCache(backend, states, sizes), places))
        else:
            raise BadArtifact(
                f"{graph.file} has states of kind {kind!r}{'' if window else ' without a window'}; known are "
                "'grow', 'append', 'conv', 'recurrent', and 'window' with a length. Build the model again."
            )
    return made[0][0] if len(made) == 1 else SplitCache(made)


def state_shapes(backend: Backend, graph: Graph) -> list[tuple[int, ...]]:
    """Return key/value heads K and width D of every state, from the graph or else from the configuration.

    A state that holds keys and values has 2 K. Of a state of one size it is all sizes after the batch.
    """
    found: list[tuple[int, ...]] = []
    for state in graph.states:
        if state.past not in backend.inputs:
            raise BadArtifact(
                f"{graph.file} has no input {state.past!r}, which the artifact's configuration names as a cache."
                + nearest(state.past, backend.inputs)
            )
        shape, combined = backend.inputs[state.past].shape, state.axis == 3
        if state.kind in FIXED_KINDS:
            sizes = tuple(size or 0 for size in shape[1:])
            if not sizes or not all(sizes):
                raise BadArtifact(
                    f"{graph.file}: input {state.past} has shape {shape}; all but the batch must be known."
                )
            found.append(sizes)
            continue
        if len(shape) != (5 if combined else 4):
            wanted = "[2, B, K, C, D]" if combined else "[B, K, C, D]"
            raise BadArtifact(f"{graph.file}: input {state.past} must have shape {wanted}, found {shape}.")
        heads, width = shape[-3] or state.heads, shape[-1] or state.head_dim
        if not heads or not width:
            raise BadArtifact(
                f"{graph.file}: neither input {state.past} nor genai_config.json says how many key/value heads "
                "there are and how large a head is (num_key_value_heads, head_size)."
            )
        found.append((2 * heads if combined else heads, width))
    return found


def _trimmed(length: int, wanted: Sequence[int]) -> int:
    longest = max(wanted, default=0)
    if not 0 <= longest <= length:
        raise CannotRewind(f"the cache holds {length} positions and cannot rewind to {longest}.")
    return longest
