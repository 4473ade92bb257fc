"""Key/value caches: what a graph carries from step to step.

A cache's kind comes from the artifact's manifest (``State.kind``), never from a look at the model.
Tensors have shape [B, K, C, D] with the positions on axis 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import Graph, State
from ortlm.dtypes import Array
from ortlm.errors import BadArtifact, CannotRewind
from ortlm.runtime.session import Backend, Binding, Tensor

Rows = NDArray[np.int64]
Shapes = Sequence[tuple[int, int]]  # key/value heads K and width D of every state

_GRAIN = 256


class Cache(Protocol):
    """The states of all layers for a batch of rows."""

    @property
    def length(self) -> int:
        """How many positions are filled, in the longest row."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``."""

    def bind(self, binding: Binding, room: int) -> None:
        """Bind every state for a run after which ``room`` positions may be filled."""

    def advance(self, tokens: int) -> None:
        """Take note that the run bound last has filled ``tokens`` more positions."""

    def trim(self, length: int) -> None:
        """Go back to ``length`` positions. Raises CannotRewind if that is more than there are."""

    def select(self, rows: Rows) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken more than once."""


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
    ) -> None:
        self._backend = backend
        self._states = states
        self._shapes = shapes
        self._context = context_tokens
        self._rows = 0
        self._length = 0
        self._capacity = 0
        self._tensors: list[Tensor] = []
        self._bound: Binding | None = None

    @property
    def length(self) -> int:
        """How many positions are filled, in the longest row."""
        return self._length

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
            self._rows, self._capacity, self._tensors, self._bound = rows, 0, [], None
        self._length = 0

    def bind(self, binding: Binding, room: int) -> None:
        """Bind every buffer as past and as present; nothing happens if that is so already."""
        if room > self._capacity:
            self._grow(room)
        if self._bound is binding:
            return
        for state, tensor in zip(self._states, self._tensors, strict=True):
            binding.input(state.past, tensor)
            binding.output(state.present, tensor)
        self._bound = binding

    def advance(self, tokens: int) -> None:
        """Take note that the run bound last has filled ``tokens`` more positions."""
        self._length += tokens

    def trim(self, length: int) -> None:
        """Go back to ``length`` positions; what lies behind them is ignored and overwritten later."""
        _check_trim(self._length, length)
        self._length = length

    def select(self, rows: Rows) -> None:
        """Keep the rows with these numbers, in this order."""
        filled = self._length
        for i, tensor in enumerate(self._tensors):
            old = tensor.numpy()
            new = np.zeros((len(rows), *old.shape[1:]), dtype=old.dtype)
            new[:, :, :filled] = old[rows, :, :filled]
            self._tensors[i] = self._backend.place(new)
        self._rows, self._bound = len(rows), None

    def _grow(self, room: int) -> None:
        # Room for an answer too: growing on its first token would copy the whole prompt's cache.
        wanted = max(room + _GRAIN // 2, self._capacity + self._capacity // 2)
        rounded = -(-wanted // _GRAIN) * _GRAIN
        self._capacity = max(room, min(rounded, self._context))
        self._bound = None
        for i, (state, (heads, width)) in enumerate(zip(self._states, self._shapes, strict=True)):
            dtype = self._backend.inputs[state.past].dtype.numpy
            new: Array = np.zeros((self._rows, heads, self._capacity, width), dtype=dtype)
            if i < len(self._tensors):
                new[:, :, : self._length] = self._tensors[i].numpy()[:, :, : self._length]
                self._tensors[i] = self._backend.place(new)
            else:
                self._tensors.append(self._backend.place(new))


class AppendCache:
    """A new tensor per state and step: what a run returns as present is the next run's past."""

    def __init__(self, backend: Backend, states: Sequence[State], shapes: Shapes) -> None:
        self._backend = backend
        self._states = states
        self._shapes = shapes
        self._rows = 0
        self._length = 0
        self._tensors: list[Tensor] = []
        self._bound: Binding | None = None

    @property
    def length(self) -> int:
        """How many positions are filled, in the longest row."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self._rows * self._length * bytes_per_token(self._backend, self._states, self._shapes)

    def start(self, rows: int) -> None:
        """Empty the cache for a batch of ``rows``."""
        self._rows, self._length, self._bound = rows, 0, None
        self._tensors = []
        for state, (heads, width) in zip(self._states, self._shapes, strict=True):
            dtype = self._backend.inputs[state.past].dtype.numpy
            self._tensors.append(self._backend.place(np.zeros((rows, heads, 0, width), dtype=dtype)))

    def bind(self, binding: Binding, room: int) -> None:
        """Bind what the last run returned as past, and new memory as present."""
        for state, tensor in zip(self._states, self._tensors, strict=True):
            binding.input(state.past, tensor)
            binding.output(state.present, None)
        self._bound = binding

    def advance(self, tokens: int) -> None:
        """Take over the tensors that the run bound last has returned."""
        assert self._bound is not None
        self._tensors = [self._bound.result(state.present) for state in self._states]
        self._length += tokens

    def trim(self, length: int) -> None:
        """Go back to ``length`` positions by copying what remains."""
        _check_trim(self._length, length)
        if length < self._length:
            self._replace(lambda old: old[:, :, :length])
            self._length = length

    def select(self, rows: Rows) -> None:
        """Keep the rows with these numbers, in this order."""
        self._replace(lambda old: old[rows])
        self._rows = len(rows)

    def _replace(self, change: _Change) -> None:
        self._tensors = [
            self._backend.place(np.ascontiguousarray(change(tensor.numpy()))) for tensor in self._tensors
        ]


class _Change(Protocol):
    def __call__(self, old: Array, /) -> Array: ...


def make_cache(backend: Backend, graph: Graph, *, context_tokens: int, shapes: Shapes | None = None) -> Cache:
    """Return the cache that fits the kind of ``graph``'s states. Raises BadArtifact for an unknown kind."""
    for state in graph.states:
        if state.past not in backend.inputs or state.present not in backend.outputs:
            raise BadArtifact(
                f"{graph.file} has no input {state.past} with output {state.present}, "
                "but the artifact's configuration names them."
            )
        if state.axis != 2:
            raise BadArtifact(
                f"{graph.file}: state {state.past} grows along axis {state.axis}; only 2 is known."
            )
    kinds = {state.kind for state in graph.states}
    shapes = state_shapes(backend, graph) if shapes is None else shapes
    if kinds == {"grow"}:
        return SharedCache(backend, graph.states, shapes, context_tokens)
    if kinds == {"append"}:
        return AppendCache(backend, graph.states, shapes)
    raise BadArtifact(f"{graph.file} has states of kind {sorted(kinds)}; known is one of 'grow', 'append'.")


def state_shapes(backend: Backend, graph: Graph) -> list[tuple[int, int]]:
    """Return key/value heads K and width D of every state, from the graph or else from the configuration."""
    found = []
    for state in graph.states:
        shape = backend.inputs[state.past].shape
        if len(shape) != 4:
            raise BadArtifact(
                f"{graph.file}: input {state.past} must have shape [B, K, C, D], found {shape}."
            )
        heads, width = shape[1] or state.heads, shape[3] or state.head_dim
        if not heads or not width:
            raise BadArtifact(
                f"{graph.file}: neither input {state.past} nor genai_config.json says how many key/value heads "
                "there are and how large a head is (num_key_value_heads, head_size)."
            )
        found.append((heads, width))
    return found


def bytes_per_token(backend: Backend, states: Sequence[State], shapes: Shapes) -> int:
    """Return how many bytes of cache one token of one row takes."""
    sizes = [backend.inputs[state.past].dtype.bytes for state in states]
    return sum(heads * width * size for (heads, width), size in zip(shapes, sizes, strict=True))


def _check_trim(length: int, wanted: int) -> None:
    if not 0 <= wanted <= length:
        raise CannotRewind(f"the cache holds {length} positions and cannot go back to {wanted}.")
