"""What every kind of cache does with the states of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from ortlm.artifact import State
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor

Shapes = Sequence[tuple[int, int]]  # key/value heads K and width D of every state


def zero_states(
    backend: Backend, states: Sequence[State], shapes: Shapes, rows: int, positions: int
) -> list[DeviceTensor]:
    """Return new tensors of zeros [rows, K, positions, D], one for each state."""
    kinds = [backend.inputs[state.past].dtype for state in states]
    return backend.memory.zeros([(rows, heads, positions, width) for heads, width in shapes], kinds)


def bind_in_place(binding: Binding, states: Sequence[State], tensors: Sequence[DeviceTensor]) -> None:
    """Let runs read and write each state in the same tensor."""
    for state, tensor in zip(states, tensors, strict=True):
        binding.input(state.past, tensor)
        binding.output(state.present, tensor)


def bytes_per_token(backend: Backend, states: Sequence[State], shapes: Shapes) -> int:
    """Return how many bytes of cache one token of one row takes."""
    sizes = [backend.inputs[state.past].dtype.bytes for state in states]
    return sum(heads * width * size for (heads, width), size in zip(shapes, sizes, strict=True))
