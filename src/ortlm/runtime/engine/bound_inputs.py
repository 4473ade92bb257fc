"""The integers that a decoder reads, bound only where they change: ids, masks, positions, and small switches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import Graph
from ortlm.dtypes import Array
from ortlm.errors import BadArtifact
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor

# What is computed with in main memory, together with shapes.
_SHAPES = {"logits_to_keep", "columns_to_keep"}
# So many tensors of other shapes are kept on a device for each input: prompts are often as long as one before.
_KEPT = 8


class BoundInputs:
    """What ``binding`` holds of a graph's integers, for runs of ``backend``.

    Raises BadArtifact if the graph takes one of them as another type.
    """

    def __init__(self, backend: Backend, graph: Graph, binding: Binding) -> None:
        self._backend, self._graph, self._binding = backend, graph, binding
        # Elsewhere, what is written to memory that is bound is never seen.
        self._in_place = backend.memory.is_host
        self._types = integer_types(backend, graph)
        self._arrays: dict[str, Array] = {}
        self._tensors: dict[str, DeviceTensor] = {}
        # What lies on the device, by shape, with its contents.
        self._placed: dict[str, dict[tuple[int, ...], tuple[DeviceTensor, bytes]]] = {}
        # Masks are parts of these, so that none has to be made for a step.
        kind = self._types.get("attention_mask", np.dtype(np.int64))
        self._ones: NDArray[np.integer] = np.ones(0, kind)
        self._ragged: NDArray[np.integer] = np.ones(0, kind)
        self._places = np.arange(0)
        self._ones_address = self._ragged_address = 0

    def put(self, role: str, array: Array, *, of: Mapping[str, str] | None = None) -> None:
        """Bind an input, or only copy its new contents to what is bound already, where runs see that."""
        name = (of or self._graph.inputs)[role]
        declared = self._backend.inputs.get(name)
        if declared is not None and len(declared.shape) > array.ndim:
            # Three positions for each token are alike in text; a number may be declared as a list of one.
            array = np.broadcast_to(array, (3 if array.ndim else 1, *array.shape))
        bound = self._arrays.get(name)
        if bound is not None and bound.shape == array.shape:
            if self._in_place:
                bound[...] = array
                return
            if np.array_equal(bound, array):
                return
        self._bind(role, name, np.array(array, self._types.get(role, array.dtype), order="C"))

    def rewrite(self, role: str, values: Sequence[int]) -> None:
        """Give an input one value for each row, [B, 1], after ``put`` has given it as many."""
        name = self._graph.inputs[role]
        array = self._arrays[name]
        array[..., 0] = values
        if not self._in_place:
            self._bind(role, name, array)

    def _bind(self, role: str, name: str, array: Array) -> None:
        """Let runs read ``array`` as the input ``name``."""
        old, self._arrays[name] = self._tensors.get(name), array
        if self._backend.captures and role not in _SHAPES:
            tensor = self._place(name, array)
            if tensor is old:
                return
        else:
            tensor = old if old is not None and old.array is array else self._backend.tensor(array)
        self._tensors[name] = tensor
        self._binding.input(name, tensor)

    def _place(self, name: str, array: Array) -> DeviceTensor:
        """Return ``array`` on the device, in memory that has held one of its shape if there is such."""
        memory, placed = self._backend.memory, self._placed.setdefault(name, {})
        contents = array.tobytes()
        old = placed.pop(array.shape, None)
        if old is None:
            tensor = memory.put(array)
        else:
            tensor, before = old
            # Masks and positions of prompts are often those of one before, and to copy costs 0.05 ms.
            if contents != before:
                memory.write(tensor, array)
        placed[array.shape] = tensor, contents
        if len(placed) > _KEPT:
            del placed[next(iter(placed))]
        return tensor

    def mask(self, ends: Sequence[int], total: int) -> None:
        """Bind the mask [B, total] of rows of which row i has ``ends[i]`` tokens."""
        rows = len(ends)
        size = rows * total
        if min(ends) == total:
            if len(self._ones) < size:
                self._ones = np.ones(2 * size, self._ones.dtype)
                self._ones_address = self._ones.ctypes.data
            mask, address = self._ones[:size].reshape(rows, total), self._ones_address
        else:
            if len(self._ragged) < size:
                self._ragged = np.ones(2 * size, self._ragged.dtype)
                self._ragged_address = self._ragged.ctypes.data
            if len(self._places) < total:
                self._places = np.arange(2 * total)
            mask, address = self._ragged[:size].reshape(rows, total), self._ragged_address
            np.less(self._places[:total], np.array(ends)[:, None], out=mask)
        name = self._graph.inputs["attention_mask"]
        if self._backend.captures:
            self._bind("attention_mask", name, mask)
        else:
            self._binding.input_array(name, mask, address)


class BoundRun:
    """What runs of ``graph`` read and write: its integers, logits in memory of their own, and the rest.

    ``logits`` is that memory, None if every run gets new one. ``logits_memory`` is what was made for so many rows,
    which serves whoever has this run next.
    """

    def __init__(self, backend: Backend, graph: Graph) -> None:
        self.binding = backend.binding()
        self.inputs = BoundInputs(backend, graph, self.binding)
        self.logits: DeviceTensor | None = None
        self.logits_memory: tuple[int, DeviceTensor] | None = None


def integer_types(backend: Backend, graph: Graph) -> dict[str, np.dtype[np.integer]]:
    """Return the element type of each input of integers, by role. Raises BadArtifact for one of another type."""
    types: dict[str, np.dtype[np.integer]] = {}
    for role, name in (*graph.inputs.items(), *graph.optional.items()):
        declared = backend.inputs.get(name)
        if declared is None or role == "inputs_embeds":
            continue
        if declared.dtype.name not in ("int32", "int64"):
            raise BadArtifact(
                f"{graph.file} takes {name!r} as {declared.dtype.name}; {role} must be int32 or int64."
            )
        types[role] = declared.dtype.numpy
    return types
