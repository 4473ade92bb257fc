"""States in a device's memory: made, grown, reordered and copied there by tiny graphs on the same provider.

Nothing is made in main memory to be copied over, and only what is asked for comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ortlm.dtypes import BY_ONNX, Array, DType, Floats, as_float32, dtype
from ortlm.runtime.engine.backend import DeviceTensor
from ortlm.runtime.engine.small_graphs import SmallGraph

# From here on Slice, Expand, Concat and Gather take every element type that states have.
_OPSET = 13
# So many numbers come over as they are in less time than it takes to start a graph on them.
_FEW = 1 << 17
_FLOAT, _INT64 = dtype("fp32").onnx, dtype("int64").onnx


class Runner(Protocol):
    """What a DeviceMemory asks of ONNX Runtime. ``writes``, ``reads``: whether those work here."""

    writes: bool
    reads: bool

    def allocate(self, shape: Sequence[int], kind: DType) -> DeviceTensor:
        """Return new memory on the device, whatever it holds."""

    def tensor(self, array: Array) -> DeviceTensor:
        """Return a tensor that aliases ``array``, in main memory."""

    def write(self, tensor: DeviceTensor, array: Array) -> None:
        """Copy ``array`` to ``tensor``, which ``allocate`` returned."""

    def read(self, tensor: DeviceTensor) -> Array:
        """Return a copy of the contents of ``tensor``, which ``allocate`` returned."""

    def load(self, model: bytes) -> Any:
        """Return a session that runs ``model`` on the device's provider."""

    def run(
        self, session: Any, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        """Run a graph that ``load`` returned on ``inputs`` which writes ``outputs``."""


class DeviceMemory:
    """A Memory on the device of ``device``. May be used by several threads."""

    is_host = False

    def __init__(self, device: Runner) -> None:
        self._device = device
        self._graphs: dict[tuple[Any, ...], Any] = {}

    def put(self, array: Array) -> DeviceTensor:
        """Return a copy of ``array`` on the device."""
        array = np.ascontiguousarray(array)
        given = self._device.tensor(array)
        # ONNX Runtime reads no arrays of types that numpy itself has not.
        if not self._device.writes or not array.size or array.dtype.kind not in "iuf":
            return self.place(given)
        new = self._device.allocate(array.shape, _kind(given))
        self._device.write(new, array)
        return new

    def place(self, tensor: DeviceTensor) -> DeviceTensor:
        """Return a copy on the device of ``tensor``, which lies in main memory."""
        shape = _shape(tensor)
        if 0 in shape:
            return tensor
        new = self._device.allocate(shape, _kind(tensor))
        self._run("copy", [tensor], [new])
        return new

    def zeros(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[DType]) -> list[DeviceTensor]:
        """Return new tensors of zeros, which the device writes itself."""
        made = [self._device.allocate(shape, kind) for shape, kind in zip(shapes, dtypes, strict=True)]
        alike: dict[tuple[tuple[int, ...], DType], list[DeviceTensor]] = {}
        for shape, kind, tensor in zip(shapes, dtypes, made, strict=True):
            alike.setdefault((shape, kind), []).append(tensor)
        for (shape, _), tensors in alike.items():
            self._run("zeros", [], tensors, shape=np.array(shape, np.int64))
        return made

    def empty(self, shape: tuple[int, ...], kind: DType) -> DeviceTensor:
        """Return a new tensor, whatever it holds."""
        return self._device.allocate(shape, kind)

    def write(self, tensor: DeviceTensor, array: Array) -> None:
        """Copy ``array`` to ``tensor``."""
        self._device.write(tensor, np.ascontiguousarray(array))

    def resize(
        self,
        tensors: list[DeviceTensor],
        filled: int,
        capacity: int,
        *,
        axis: int = 2,
        into: Sequence[DeviceTensor] | None = None,
    ) -> None:
        """Replace each tensor by one of ``capacity`` positions, or of ``into``; ``filled`` are kept."""
        # One after the other, so that there are never two caches unless the second was there.
        for i, tensor in enumerate(tensors):
            old = _shape(tensor)
            new = (
                self._device.allocate((*old[:axis], capacity, *old[axis + 1 :]), _kind(tensor))
                if into is None
                else into[i]
            )
            if filled == capacity:
                self._cut(tensor, new, (0, old[axis - 2]), (0, filled), axis)
            else:
                tail = (*old[:axis], capacity - filled, *old[axis + 1 :])
                given = {"stop": np.array([filled], np.int64), "tail": np.array(tail, np.int64)}
                self._run("grow", [tensor], [new], axis, 0, **given)
            tensors[i] = new

    def take_rows(
        self, tensors: list[DeviceTensor], rows: NDArray[np.int64], *, filled: int, axis: int = 2
    ) -> None:
        """Replace each tensor by its ``rows``."""
        new: list[DeviceTensor] = []
        alike: dict[DType, list[int]] = {}
        for i, tensor in enumerate(tensors):
            old, kind = _shape(tensor), _kind(tensor)
            new.append(self._device.allocate((*old[: axis - 2], len(rows), *old[axis - 1 :]), kind))
            alike.setdefault(kind, []).append(i)
        for numbers in alike.values():
            given = [tensors[i] for i in numbers]
            self._run("rows", given, [new[i] for i in numbers], axis, rows=np.array(rows, np.int64))
        tensors[:] = new

    def move_rows(
        self, tensors: list[DeviceTensor], rows: NDArray[np.int64], *, filled: int, start: int = 0
    ) -> bool:
        """Put ``rows`` in place of all rows: new tensors, unless every row stays where it is."""
        if not tensors or np.array_equal(rows, np.arange(_shape(tensors[0])[0])):
            return False
        self.take_rows(tensors, rows, filled=filled)
        return True

    def read(
        self, tensors: Sequence[DeviceTensor], start: int, stop: int, *, row: int | None = None, axis: int = 2
    ) -> list[Array]:
        """Return copies of positions ``start`` to ``stop``, of all rows or of one."""
        found: list[Array] = []
        for tensor in tensors:
            shape = list(_shape(tensor))
            rows = (0, shape[axis - 2]) if row is None else (row, row + 1)
            shape[axis - 2], shape[axis] = rows[1] - rows[0], stop - start
            array: Array = np.empty(shape, _kind(tensor).numpy)
            if array.size:
                self._cut(tensor, self._device.tensor(array), rows, (start, stop), axis)
            found.append(array)
        return found

    def float32(self, tensor: DeviceTensor) -> Floats:
        """Return the floating-point contents in main memory as float32, many converted on the device."""
        if self._device.reads and math.prod(_shape(tensor)) <= _FEW and _kind(tensor).name != "bf16":
            return as_float32(self._device.read(tensor))
        found: Floats = np.empty(_shape(tensor), np.float32)
        self._run(
            "float32" if _kind(tensor).name != "fp32" else "copy", [tensor], [self._device.tensor(found)]
        )
        return found

    def most_likely(self, logits: DeviceTensor) -> NDArray[np.int64] | None:
        """Return the id of the largest of ``logits`` [B, 1, V] in each row; None if one is not finite."""
        if self._device.reads and math.prod(_shape(logits)) <= _FEW:
            if _kind(logits).name == "fp16":
                best = _largest(self._device.read(logits)[:, 0])
                if best is not None:
                    return best
            few = self.float32(logits)[:, 0]
            return np.argmax(few, axis=1).astype(np.int64) if np.isfinite(few).all() else None
        found: Floats = np.empty(_shape(logits)[:2], np.float32)
        self._run("largest", [logits], [self._device.tensor(found)], width=_shape(logits)[2])
        return found[:, 0].astype(np.int64) if np.isfinite(found).all() else None

    def edit(self, tensors: list[DeviceTensor], change: Callable[[int, Array], None]) -> bool:
        """Let ``change`` alter copies of the contents, which are put back as new tensors."""
        for i, tensor in enumerate(tensors):
            (array,) = self.read([tensor], 0, _shape(tensor)[2])
            change(i, array)
            tensors[i] = self.put(array)
        return True

    def _cut(
        self,
        tensor: DeviceTensor,
        new: DeviceTensor,
        rows: tuple[int, int],
        positions: tuple[int, int],
        axis: int,
    ) -> None:
        low, high = zip(rows, positions, strict=True)
        self._run("cut", [tensor], [new], axis, start=np.array(low, np.int64), stop=np.array(high, np.int64))

    def _run(
        self,
        what: str,
        given: Sequence[DeviceTensor],
        new: Sequence[DeviceTensor],
        axis: int = 0,
        width: int = 0,
        **small: NDArray[np.int64],
    ) -> None:
        key = what, _kind((given or new)[0]), len(new), len(_shape((given or new)[0])), axis, width
        session = self._graphs.get(key)
        if session is None:
            session = self._graphs[key] = self._device.load(_graph(*key))
        inputs = {f"x{i}": tensor for i, tensor in enumerate(given)}
        inputs |= {name: self._device.tensor(array) for name, array in small.items()}
        self._device.run(session, inputs, {f"y{i}": tensor for i, tensor in enumerate(new)})


def _largest(logits: Array) -> NDArray[np.int64] | None:
    """Return the place of the largest of fp16 ``logits`` [B, V] in each row, the lowest among equals.

    None unless all are finite and the largest are above zero, which they are but for odd models: whole numbers
    made of the bits have the same order there, and numpy compares those much faster.
    """
    bits = logits.view(np.int16)
    best = bits.argmax(axis=1)
    largest = bits[np.arange(len(bits)), best]
    # From here on an exponent says infinite, or not a number.
    finite = largest.max() < 0x7C00 and bits.view(np.uint16).max() < 0xFC00
    return best if finite and largest.min() > 0 else None


def _shape(tensor: DeviceTensor) -> tuple[int, ...]:
    return tuple(tensor.value.shape()) if tensor.array is None else tensor.array.shape


def _kind(tensor: DeviceTensor) -> DType:
    return BY_ONNX[tensor.value.element_type()]


def _graph(what: str, kind: DType, count: int, rank: int, axis: int, width: int) -> bytes:
    """Return a graph that does one thing to ``count`` tensors x0, x1 ... at once, with the results y0, y1 ...

    ``width`` is the size of the last dimension for "largest".
    """
    graph = SmallGraph(what, _OPSET)
    op, element = graph.op, kind.onnx

    def given(name: str, size: str) -> str:
        return graph.input(name, _INT64, [size])

    def sizes(name: str) -> list[str]:
        return [f"{name}_{at}" for at in range(rank)]

    named = [(f"x{i}", f"y{i}") for i in range(count)]
    result, dimensions = element, rank
    if what != "zeros":
        for x, _ in named:
            graph.input(x, element, sizes(x))
    if what == "zeros":
        shape, zero = given("shape", "rank"), graph.constant("zero", np.zeros((), kind.numpy))
        for _, y in named:
            op("Expand", zero, shape, name=y)
    elif what == "copy":
        for x, y in named:
            op("Identity", x, name=y)
    elif what == "float32":
        result = _FLOAT
        for x, y in named:
            op("Cast", x, name=y, to=_FLOAT)
    elif what == "largest":
        # 0 times what is not finite is not a number, and ArgMax passes over those.
        none = graph.constant("none", np.zeros((width, 1), np.float32))
        size = graph.constant("size", np.array([-1, 1], np.int64))
        result, dimensions = _FLOAT, 2
        for x, y in named:
            wide = op("Cast", x, to=_FLOAT)
            at = op("Cast", op("ArgMax", wide, axis=2, keepdims=0), to=_FLOAT)
            op("Add", at, op("Reshape", op("MatMul", wide, none), size), name=y)
    elif what == "rows":
        rows = given("rows", "rows")
        for x, y in named:
            op("Gather", x, rows, name=y, axis=axis - 2)
    elif what == "cut":
        start, stop = given("start", "axes"), given("stop", "axes")
        axes = graph.constant("axes", np.array([axis - 2, axis], np.int64))
        for x, y in named:
            op("Slice", x, start, stop, axes, name=y)
    else:
        start = graph.constant("start", np.array([0], np.int64))
        axes = graph.constant("axes", np.array([axis], np.int64))
        stop, tail = given("stop", "one"), given("tail", "rank")
        end = op("Expand", graph.constant("zero", np.zeros((), kind.numpy)), tail)
        for x, y in named:
            op("Concat", op("Slice", x, start, stop, axes), end, name=y, axis=axis)
    for _, y in named:
        graph.output(y, result, sizes(y)[:dimensions])
    return graph.model()
