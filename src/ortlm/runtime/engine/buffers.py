"""Rows of buffers that graphs read and write in place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.engine.session import Backend, DeviceTensor


def take_rows(
    backend: Backend, tensors: list[DeviceTensor], rows: NDArray[np.int64], *, filled: int, start: int = 0
) -> bool:
    """Put ``rows`` of every tensor [B, K, C, D], filled up to ``filled`` positions, in place of all rows.

    If there are as many as before, only positions from ``start`` on are copied. Returns whether the tensors are
    new ones, which have to be bound.
    """
    if tensors and all(t.array is not None and len(t.array) == len(rows) for t in tensors):
        # Beams that change places: only those are copied, within the buffers.
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        for tensor in tensors if len(moved) else ():
            buffer = tensor.numpy()
            buffer[moved, :, start:filled] = buffer[rows[moved], :, start:filled]
        return False
    for i, tensor in enumerate(tensors):
        old = tensor.numpy()
        new = np.zeros((len(rows), *old.shape[1:]), dtype=old.dtype)
        new[:, :, :filled] = old[rows, :, :filled]
        tensors[i] = backend.place(new)
    return True
