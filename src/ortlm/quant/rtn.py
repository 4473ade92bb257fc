"""Quantizers that need no data: rounding to nearest, and rounding after a search for the clipping range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ortlm.dtypes import Array, dtype
from ortlm.quant.pack import pack, unpack
from ortlm.quant.scheme import Scheme

# Elements that are worked on at once.
_CACHED = 1 << 18


@dataclass(frozen=True, slots=True)
class Packed:
    """Quantized rows.

    ``values`` uint8 [rows, row_bytes], ``scales`` float32 [rows, blocks], ``zeros`` uint8
    [rows, zero_row_bytes] or None if symmetric.
    """

    values: Array
    scales: Array
    zeros: Array | None


Quantizer = Callable[[Array, Scheme], Packed]

# The smallest number that fp16 holds in full precision.
_NORMAL = np.float32(2.0**-14)


def rtn(weight: Array, scheme: Scheme) -> Packed:
    """Round each block of ``weight`` float32 [rows, inputs] to the nearest level of its own range.

    Asymmetric: the range is [min(w, 0), max(w, 0)], so that 0.0 is a level. Symmetric: the value of largest
    magnitude sits on level ``-2**(bits-1)``, the one without a positive twin, so a scale may be negative.
    ``inputs`` need not be a multiple of the block; missing inputs count as 0.

    Source: bit-equal to ONNX Runtime's own quantizer (onnxruntime/core/mlas/lib/q4_dq.cpp).
    """
    blocks = _blocks(weight, scheme)
    if scheme.symmetric:
        scales = _extreme(blocks) / np.float32(-scheme.zero)
        zeros = np.full(scales.shape, scheme.zero, np.float32)
    else:
        scales, zeros = _affine(*_range(blocks), scheme)
    scales[scales == 0] = 1  # an all-zero block: any scale does
    return _finish(blocks, scales, zeros, scheme)


def clip_search(weight: Array, scheme: Scheme, importance: Array | None = None) -> Packed:
    """Round each block of ``weight`` float32 [rows, inputs] within the range that loses least.

    Tries ranges shrunk to between 100 % and 60 % and keeps, block by block, the one with the smallest
    squared error, each weight counting by the ``importance`` [inputs] of its input. Without that, each counts
    by its magnitude plus the block's root mean square: large weights matter more to the output, as in
    llama.cpp's k-quants. Roughly ten times the work of ``rtn``.
    """
    scales, zeros = clipped_range(weight, scheme, importance)
    return _finish(_blocks(weight, scheme), scales, zeros, scheme)


def clipped_range(weight: Array, scheme: Scheme, importance: Array | None) -> tuple[Array, Array]:
    """Return scales and zeros, float32 [rows, blocks] each, of the ranges that lose least; see ``clip_search``."""
    # A few rows at a time stay in the processor's cache.
    step = max(1, _CACHED // weight.shape[1])
    pieces = [_clipped(weight[a : a + step], scheme, importance) for a in range(0, len(weight), step)]
    return np.concatenate([s for s, _ in pieces]), np.concatenate([z for _, z in pieces])


def _clipped(weight: Array, scheme: Scheme, importance: Array | None) -> tuple[Array, Array]:
    blocks = _blocks(weight, scheme)
    if importance is None:
        counts = np.abs(blocks) + np.sqrt(np.mean(blocks * blocks, axis=-1, keepdims=True))
    else:
        counts = _blocks(importance[None, :], scheme)
    low, high = _range(blocks)
    extreme = _extreme(blocks) if scheme.symmetric else high
    best_error = np.full(low.shape, np.inf, np.float32)
    best_scales = np.ones(low.shape, np.float32)
    best_zeros = np.full(low.shape, scheme.zero, np.float32)
    top = np.float32((1 << scheme.bits) - 1)
    for ratio in np.linspace(1.0, 0.6, 11, dtype=np.float32):
        if scheme.symmetric:
            scales, zeros = extreme * (ratio / np.float32(-scheme.zero)), best_zeros
        else:
            scales, zeros = _affine(low * ratio, high * ratio, scheme)
        scales = np.where(scales == 0, np.float32(1), scales)
        s, z = scales[..., None], zeros[..., None]
        off = np.clip(np.rint(blocks / s + z), 0, top)
        off -= z
        off *= s
        off -= blocks
        off *= off
        off *= counts
        error = off.sum(axis=-1)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_scales, scales, where=better)
        if not scheme.symmetric:
            np.copyto(best_zeros, zeros, where=better)
    return best_scales, best_zeros


def stored(scales: Array, scheme: Scheme) -> Array:
    """Return ``scales`` as ``scheme`` stores them, float32; codes are rounded against these.

    Those that fp16 holds in few digits only are rounded up, so that the largest weight of a block keeps its code
    and none becomes 0. What fp16 cannot hold is infinite.
    """
    if scheme.scales == "fp32":
        return scales.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        small = scales.astype(dtype(scheme.scales).numpy)
    if scheme.scales == "fp16":
        size = np.abs(scales)
        short = (size < _NORMAL) & (np.abs(small.astype(np.float32)) < size)
        if short.any():
            up = np.nextafter(np.abs(small[short]), np.float16(np.inf))
            small[short] = np.copysign(up, scales[short])
    return small.astype(np.float32)


def dequantize(packed: Packed, scheme: Scheme, inputs: int) -> Array:
    """Return the float32 weights [rows, inputs] that ``packed`` stands for."""
    blocks = packed.scales.shape[-1]
    codes = unpack(packed.values, scheme.bits, blocks * scheme.block).astype(np.float32)
    codes = codes.reshape(*packed.scales.shape, scheme.block)
    zeros = (
        np.float32(scheme.zero)
        if packed.zeros is None
        else unpack(packed.zeros, scheme.kernel_bits, blocks)[..., None].astype(np.float32)
    )
    return ((codes - zeros) * packed.scales[..., None]).reshape(len(packed.scales), -1)[:, :inputs]


def _blocks(weight: Array, scheme: Scheme) -> Array:
    rows, inputs = weight.shape
    short = -inputs % scheme.block
    if short:
        weight = np.pad(weight, ((0, 0), (0, short)))
    return weight.reshape(rows, -1, scheme.block)


def _extreme(blocks: Array) -> Array:
    """Return each block's value of largest magnitude, with its sign."""
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    return np.asarray(np.where(high > -low, high, low))


def _range(blocks: Array) -> tuple[Array, Array]:
    return np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)


def _affine(low: Array, high: Array, scheme: Scheme) -> tuple[Array, Array]:
    top = np.float32((1 << scheme.bits) - 1)
    scales = (high - low) / top
    safe = np.where(scales == 0, np.float32(1), scales)
    return scales, np.clip(np.rint(-low / safe), 0, top)


def _finish(blocks: Array, scales: Array, zeros: Array, scheme: Scheme) -> Packed:
    scales = stored(scales, scheme)
    codes = blocks / scales[..., None]
    codes += zeros[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, (1 << scheme.bits) - 1, out=codes)
    rows = len(blocks)
    return Packed(
        values=pack(codes.astype(np.uint8).reshape(rows, -1), scheme.bits),
        scales=scales,
        zeros=None if scheme.symmetric else pack(zeros.astype(np.uint8), scheme.kernel_bits),
    )
