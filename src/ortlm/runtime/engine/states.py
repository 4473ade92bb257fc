"""What every kind of cache does with the states of a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import State
from ortlm.dtypes import Array
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor

# Kinds of states that have one size, however long the text is.
FIXED_KINDS = ("conv", "recurrent")
# Of every state: key/value heads K and width D, or all sizes after the batch where it has one size.
Shapes = Sequence[tuple[int, ...]]


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
    """Return how many bytes of cache one token of one row takes, where the cache grows."""
    return sum(
        math.prod(shape) * backend.inputs[state.past].dtype.bytes
        for state, shape in zip(states, shapes, strict=True)
        if state.kind not in FIXED_KINDS
    )


def with_row(states: Sequence[Array], row: Sequence[Array]) -> list[Array]:
    """Return ``states`` [B, K, N, D] and those of a ``row`` [1, K, M, D] after them, [B + 1, K, max(N, M), D].

    What is shorter ends with zeros.
    """
    made = []
    for several, one in zip(states, row, strict=True):
        count, heads, old, width = several.shape
        new = np.zeros((count + 1, heads, max(old, one.shape[2]), width), several.dtype)
        new[:count, :, :old] = several
        new[count, :, : one.shape[2]] = one[0]
        made.append(new)
    return made


def without_row(rows: int, row: int) -> NDArray[np.int64]:
    """Return the numbers of ``rows`` rows without ``row``, whose place the last one takes."""
    numbers = np.arange(rows - 1)
    if row < rows - 1:
        numbers[row] = rows - 1
    return numbers
