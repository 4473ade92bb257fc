"""Packing of codes into bytes.

Codes of 2, 4 and 8 bits lie as MatMulNBits and GatherBlockQuantized read them. Their kernels know no other widths:
graphs widen codes of 3 bits to 4, and of 5 and 6 to 8, when they are loaded (``graph/stored_codes.py``). So these
lie in two planes, which a few operators on whole tensors put together again.
"""

from __future__ import annotations

import numpy as np

from ortlm.dtypes import Array


def pack(codes: Array, bits: int) -> Array:
    """Pack uint8 ``codes`` [..., n] into bytes [..., ceil(n · bits / 8)].

    With 2, 4 and 8 bits the first code is in the lowest bits. With 5 and 6 bits, the lower 4 bits of all codes
    come first, then the upper ones. A byte of a plane that holds k codes has those that lie n / k apart, the first
    in the lowest bits; n is first made a multiple of 8. Two codes of 3 bits in a row are one of 6.

    Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """
    if bits == 3:
        odd = codes.shape[-1] % 2
        if odd:
            codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
        return pack(codes[..., ::2] | codes[..., 1::2] << np.uint8(3), 6)
    if bits in (5, 6):
        short = -codes.shape[-1] % 8
        if short:
            codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
        return np.asarray(np.concatenate([_plane(codes & 15, 4), _plane(codes >> 4, bits - 4)], axis=-1))
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
    codes: Array
    if bits == 3:
        pairs = unpack(packed, 6, packed.shape[-1] * 8 // 6)
        codes = np.stack([pairs & np.uint8(7), pairs >> np.uint8(3)], axis=-1)
        return codes.reshape(*packed.shape[:-1], -1)[..., :count]
    if bits in (5, 6):
        low = packed.shape[-1] * 4 // bits
        upper = _from_plane(packed[..., low:], bits - 4) << 4
        codes = _from_plane(packed[..., :low], 4) | upper
        return codes[..., :count]
    if bits == 8:
        return packed[..., :count]
    per = 8 // bits
    shifts = (bits * np.arange(per)).astype(np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def _plane(codes: Array, bits: int) -> Array:
    """Pack codes of ``bits`` [..., n] so that those in one byte lie n · bits / 8 apart."""
    parts = np.split(codes, 8 // bits, axis=-1)
    packed: Array = parts[0].copy()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << np.uint8(bits * i)
    return packed


def _from_plane(packed: Array, bits: int) -> Array:
    mask = np.uint8((1 << bits) - 1)
    parts: list[Array] = [(packed >> np.uint8(bits * i)) & mask for i in range(8 // bits)]
    return np.asarray(np.concatenate(parts, axis=-1))
