"""What the runtime asks of whatever runs a graph: tensors, where they lie, and what a run reads and writes.

``Session`` is ONNX Runtime through these protocols; tests implement them with numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ortlm.dtypes import Array, DType, Floats


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, element type and shape of a graph's input or output; a dimension that varies is None."""

    name: str
    dtype: DType
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """A tensor that graphs read or write.

    ``value`` is ONNX Runtime's handle. ``array`` is the memory that it aliases, if it does not belong to ONNX
    Runtime. ``owner`` is what else has to live as long. ``on_device``: only ``Memory.read`` gets at the contents.
    """

    value: Any
    array: Array | None = None
    owner: Any = None
    on_device: bool = False

    def numpy(self) -> Array:
        """Return the contents: the aliased memory itself if there is some, else a copy.

        Raises TypeError for a tensor on a device: nothing may copy from there unawares.
        """
        if self.array is not None:
            return self.array
        if self.on_device:
            raise TypeError("this tensor lies on a device; Memory.read copies from there.")
        found: Array = self.value.numpy()
        return found


class Memory(Protocol):
    """Where a graph's states lie, and all that is done to them between runs.

    Tensors have their rows on axis ``axis`` - 2 and their positions on axis ``axis``.
    """

    @property
    def is_host(self) -> bool:
        """Whether that is main memory: tensors alias arrays, and runs see what is written there after binding."""

    def put(self, array: Array) -> DeviceTensor:
        """Return ``array`` as a tensor there; in main memory it aliases ``array``."""

    def place(self, tensor: DeviceTensor) -> DeviceTensor:
        """Return what ``tensor``, in main memory, holds as a tensor there; in main memory ``tensor`` itself."""

    def zeros(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[DType]) -> list[DeviceTensor]:
        """Return new tensors of zeros."""

    def empty(self, shape: tuple[int, ...], kind: DType) -> DeviceTensor:
        """Return a new tensor, whatever it holds."""

    def write(self, tensor: DeviceTensor, array: Array) -> None:
        """Copy ``array``, of the same shape and type, to ``tensor``, which runs see wherever it is bound."""

    def resize(
        self,
        tensors: list[DeviceTensor],
        filled: int,
        capacity: int,
        *,
        axis: int = 2,
        into: Sequence[DeviceTensor] | None = None,
    ) -> None:
        """Replace each tensor by one of ``capacity`` positions, the first ``filled`` kept and zeros after them.

        By those of ``into`` if they are given.
        """

    def take_rows(
        self, tensors: list[DeviceTensor], rows: NDArray[np.int64], *, filled: int, axis: int = 2
    ) -> None:
        """Replace each tensor by its ``rows``, filled up to ``filled`` positions."""

    def move_rows(
        self, tensors: list[DeviceTensor], rows: NDArray[np.int64], *, filled: int, start: int = 0
    ) -> bool:
        """Put ``rows`` of every tensor in place of all rows, within the tensors where that can be.

        If there are as many as before, positions below ``start`` are alike in rows that change places. Returns
        whether ``tensors`` holds new ones, which have to be bound.
        """

    def read(
        self, tensors: Sequence[DeviceTensor], start: int, stop: int, *, row: int | None = None, axis: int = 2
    ) -> list[Array]:
        """Return positions ``start`` to ``stop`` of all rows or of one: copies, or parts of the memory itself."""

    def float32(self, tensor: DeviceTensor) -> Floats:
        """Return the floating-point contents in main memory as float32, converted where they lie."""

    def most_likely(self, logits: DeviceTensor) -> NDArray[np.int64] | None:
        """Return the id of the largest of ``logits`` [B, 1, V] in each row, int64 [B]; the lowest among equals.

        None if one of them is infinity or not a number.
        """

    def edit(self, tensors: list[DeviceTensor], change: Callable[[int, Array], None]) -> bool:
        """Let ``change`` alter the contents of each, given its number; returns what ``move_rows`` does."""


class Binding(Protocol):
    """Which tensors a run reads and writes. What was bound stays bound until it is bound again.

    A device takes its copy of what lies in main memory when that is bound, and never sees what is written there
    later. So where the backend's memory is not ``is_host``, what changes has to be bound for every run.
    """

    def input(self, name: str, tensor: DeviceTensor) -> None:
        """Let runs read ``tensor`` as the input ``name``."""

    def input_array(self, name: str, array: Array, address: int | None = None) -> None:
        """Let runs read ``array``, in main memory, as the input ``name``: faster than to make a tensor of it.

        ``address`` is where it lies, if that is known.
        """

    def output(self, name: str, tensor: DeviceTensor | None, *, to_host: bool = False) -> None:
        """Let the next run write the output ``name`` to ``tensor``.

        None: to new memory where the graph computes, or with ``to_host`` to new main memory.
        """

    def result(self, name: str) -> DeviceTensor:
        """Return what the last run wrote to the output ``name``."""

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called, and no run has met it yet."""

    def stop(self) -> None:
        """End the run that another thread is in with this binding, or else the next one, with Cancelled."""

    def resume(self) -> None:
        """Take ``stop`` back."""


class Backend(Protocol):
    """Something that runs one graph: ``Session``, or a fake in tests."""

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        """Every input that must be given."""

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Every output."""

    @property
    def memory(self) -> Memory:
        """Where what runs write for each other lies."""

    @property
    def captures(self) -> bool:
        """Whether runs can be captured. What is bound to others must then lie in memory of the device.

        A captured run launched again writes to what it took for intermediate results, whatever is there by now,
        the copies of bound inputs included.
        """

    def tensor(self, array: Array) -> DeviceTensor:
        """Return a tensor that aliases ``array``, in main memory."""

    def binding(self) -> Binding:
        """Return an empty binding."""

    def run(self, binding: Binding, *, brief: bool = False, capture: int | None = None) -> None:
        """Run the graph once; see Session."""

    def release(self, capture: int) -> None:
        """Forget the run that was captured under the number ``capture``."""
