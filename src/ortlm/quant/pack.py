"""Packing of codes into bytes, in the layout of MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

import numpy as np

from ortlm.dtypes import Array


def pack(codes: Array, bits: int) -> Array:
    """Pack uint8 ``codes`` [..., n] into bytes [..., ceil(n · bits / 8)], first code in the lowest bits.

    Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """
    if bits == 8:
        return codes
    per = 8 // bits
    short = -codes.shape[-1] % per
    if short:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    if bits == 4:
        # Two codes read as one little-endian number are low + 256·high: contiguous and three times as fast
        # as picking every other byte.
        pairs = np.ascontiguousarray(codes).view("<u2")
        return np.asarray((pairs | (pairs >> 4)).astype(np.uint8))
    quads = np.ascontiguousarray(codes).view("<u4")
    folded = quads | (quads >> 6) | (quads >> 12) | (quads >> 18)
    return np.asarray(folded.astype(np.uint8))


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Return the first ``count`` codes (uint8) along the last axis of ``packed`` [..., bytes]."""
    if bits == 8:
        return packed[..., :count]
    per = 8 // bits
    shifts = (bits * np.arange(per)).astype(np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]
