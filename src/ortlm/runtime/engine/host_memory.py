"""States in main memory: numpy arrays that graphs read and write in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.dtypes import Array, DType, Floats, as_float32
from ortlm.runtime.engine.backend import DeviceTensor


class HostMemory:
    """A Memory whose tensors alias arrays; ``tensor`` makes one of an array.

    ``is_host``: what is written to memory that is bound is seen by later runs.
    """

    def __init__(self, tensor: Callable[[Array], DeviceTensor], *, is_host: bool = True) -> None:
        self._tensor, self.is_host = tensor, is_host

    def put(self, array: Array) -> DeviceTensor:
        """Return a tensor that aliases ``array``."""
        return self._tensor(array)

    def place(self, tensor: DeviceTensor) -> DeviceTensor:
        """Return ``tensor`` itself."""
        return tensor

    def zeros(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[DType]) -> list[DeviceTensor]:
        """Return new tensors of zeros."""
        return [self._tensor(np.zeros(shape, kind.numpy)) for shape, kind in zip(shapes, dtypes, strict=True)]

    def empty(self, shape: tuple[int, ...], kind: DType) -> DeviceTensor:
        """Return a new tensor, whatever it holds."""
        return self._tensor(np.empty(shape, kind.numpy))

    def write(self, tensor: DeviceTensor, array: Array) -> None:
        """Copy ``array`` to ``tensor``."""
        tensor.numpy()[...] = array

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
        kept = (*[slice(None)] * axis, slice(filled))
        for i, tensor in enumerate(tensors):
            old = tensor.numpy()
            if filled == capacity:
                new = np.array(old[kept], order="C")
            else:
                new = np.zeros((*old.shape[:axis], capacity, *old.shape[axis + 1 :]), old.dtype)
                new[kept] = old[kept]
            if into is None:
                tensors[i] = self._tensor(new)
            else:
                self.write(into[i], new)
                tensors[i] = into[i]

    def take_rows(
        self, tensors: list[DeviceTensor], rows: NDArray[np.int64], *, filled: int, axis: int = 2
    ) -> None:
        """Replace each tensor by its ``rows``, filled up to ``filled`` positions."""
        for i, tensor in enumerate(tensors):
            old = tensor.numpy()
            if axis == 2:
                new = np.zeros((len(rows), *old.shape[1:]), dtype=old.dtype)
                new[:, :, :filled] = old[rows, :, :filled]
            else:
                new = np.zeros((len(old), len(rows), *old.shape[2:]), dtype=old.dtype)
                new[:, :, :, :filled] = old[:, rows, :, :filled]
            tensors[i] = self._tensor(new)

    def move_rows(
        self, tensors: list[DeviceTensor], rows: NDArray[np.int64], *, filled: int, start: int = 0
    ) -> bool:
        """Put ``rows`` in place of all rows: within the buffers if there are as many as before."""
        if not all(tensor.array is not None and len(tensor.array) == len(rows) for tensor in tensors):
            self.take_rows(tensors, rows, filled=filled)
            return True
        # Beams that change places: only those are copied.
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        for tensor in tensors if len(moved) else ():
            buffer = tensor.numpy()
            buffer[moved, :, start:filled] = buffer[rows[moved], :, start:filled]
        return False

    def read(
        self, tensors: Sequence[DeviceTensor], start: int, stop: int, *, row: int | None = None, axis: int = 2
    ) -> list[Array]:
        """Return positions ``start`` to ``stop``, of all rows or of one, as parts of the memory."""
        rows = slice(None) if row is None else slice(row, row + 1)
        part = (*[slice(None)] * (axis - 2), rows, slice(None), slice(start, stop))
        return [tensor.numpy()[part] for tensor in tensors]

    def float32(self, tensor: DeviceTensor) -> Floats:
        """Return the floating-point contents as float32: the memory itself if it holds that."""
        return as_float32(tensor.numpy())

    def most_likely(self, logits: DeviceTensor) -> NDArray[np.int64] | None:
        """Return the id of the largest of ``logits`` [B, 1, V] in each row; None if one is not finite."""
        found = self.float32(logits)[:, 0]
        return np.argmax(found, axis=1).astype(np.int64) if np.isfinite(found).all() else None

    def edit(self, tensors: list[DeviceTensor], change: Callable[[int, Array], None]) -> bool:
        """Let ``change`` alter the contents of each in place."""
        for i, tensor in enumerate(tensors):
            change(i, tensor.numpy())
        return False
