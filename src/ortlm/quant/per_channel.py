"""Whole columns in 8 bits, for integer matmuls."""

from __future__ import annotations

import numpy as np

from ortlm.dtypes import Array

_MOST = 127


def round_columns(weight: Array) -> tuple[Array, Array]:
    """Return codes int8, of the shape of ``weight`` float32 [out, in], and scales float32 [out]: code · scale.

    Symmetric, with a scale for each output: that is what an integer matmul can compensate for afterwards.
    """
    scales = np.abs(weight).max(axis=1, initial=0.0) / np.float32(_MOST)
    scales[scales == 0] = 1  # all zeros: any scale does
    codes = np.rint(weight / scales[:, None]).clip(-_MOST, _MOST)
    return codes.astype(np.int8), scales.astype(np.float32)
