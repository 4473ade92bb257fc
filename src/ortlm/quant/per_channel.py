"""Whole columns in 8 bits, for integer matmuls."""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np

from ortlm.dtypes import Array

_MOST = 127
# Rows that stay in the processor's cache while they are rounded.
_CACHED = 64


def round_columns(weight: Array) -> tuple[Array, Array]:
    """Return codes int8, of the shape of ``weight`` float32 [out, in], and scales float32 [out]: code · scale.

    Symmetric, with a scale for each output: that is what an integer matmul can compensate for afterwards.
    """
    scales = np.abs(weight).max(axis=1, initial=0.0) / np.float32(_MOST)
    scales[scales == 0] = 1  # all zeros: any scale does
    codes = np.rint(weight / scales[:, None]).clip(-_MOST, _MOST)
    return codes.astype(np.int8), scales.astype(np.float32)


def turned_columns(weight: Array, pool: Executor) -> tuple[Array, Array]:
    """Return what ``round_columns`` does, with codes [in, out], as products take them: a few rows per thread."""
    rows, inputs = weight.shape
    codes, scales = np.empty((inputs, rows), np.int8), np.empty(rows, np.float32)

    def turn(start: int) -> None:
        at = slice(start, start + _CACHED)
        found, scales[at] = round_columns(weight[at])
        codes[:, at] = found.T

    list(pool.map(turn, range(0, rows, _CACHED)))
    return codes, scales
