"""Weights in small floating-point types with scales: FP8 and FP4, in all the ways that scales lie."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ortlm.checkpoint.quantized_weight import Codes, Grid, QuantizedWeight, fitted
from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array, Floats

# What the four bits of FP4 (E2M1) stand for, times two: whole numbers.
FP4_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_MXFP4_BLOCK = 32
# The largest scale of a float32: 2**127. E8M0 has one more, which stands for no number.
_NAN_SCALE = 255


@dataclass(frozen=True, slots=True, eq=False)
class ScaledWeight(QuantizedWeight):
    """value · scale, for values [out, in] of a type that numpy knows.

    ``scales`` is one number, a vector or column [out], or a matrix with a scale for each block of the values,
    [out / rows, in / columns], sizes rounded up.
    """

    values: Weight = field(kw_only=True)
    scales: Weight = field(kw_only=True)
    tile: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """Size in the file, with scales."""
        return self.values.bytes + self.scales.bytes

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), dequantized, as float32."""
        found = self.values.rows(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(found * self._scales(start, stop), np.float32)

    def _scales(self, start: int, stop: int) -> Array:
        if self.tile is not None:
            height, width = self.tile
            low, high = start // height, -(-stop // height)
            found = np.repeat(self.scales.rows(low, high), height, axis=0)
            found = np.repeat(found[start - low * height : stop - low * height], width, axis=1)
            return found[:, : self.shape[1]]
        if self.scales.shape[0] == 1:
            return self.scales.rows(0, 1).reshape(1, 1)
        return self.scales.rows(start, stop).reshape(-1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Fp4Weight(QuantizedWeight):
    """value · scale for FP4 values, two in a byte of ``packed`` [out, in / 2], the first in the lower half.

    Each ``block`` inputs share one of ``scales`` [out, in / block]: a power of two (E8M0), or a number that is
    divided or multiplied by one for the whole weight, ``divisor`` or ``factor``. ``first`` is the row of
    both tensors where this weight begins.
    """

    packed: Weight = field(kw_only=True)
    scales: Weight = field(kw_only=True)
    block: int = _MXFP4_BLOCK
    powers: bool = True
    divisor: Weight | None = None
    factor: Weight | None = None
    first: int = 0

    @property
    def bytes(self) -> int:
        """Size in the file, with scales."""
        return self.shape[0] * (self.shape[1] // 2 + self.shape[1] // self.block * self.scales.dtype.bytes)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), dequantized, as float32."""
        halves = self._halves(start, stop).astype(np.float32) * np.float32(0.5)
        with np.errstate(over="ignore", invalid="ignore"):
            return halves * np.repeat(self._scales(start, stop), self.block, axis=1)

    def grid(self) -> Grid | None:
        """Return the grid of 8 bits on which all values lie; scales that are no powers of two need more bytes."""
        if not self.powers:
            return None
        found = self._exponents(0, self.shape[0])
        # Halved, fp16 holds them from 2**-24 to 2**15.
        half = bool(found.size) and int(found.min()) >= 127 - 23 and int(found.max()) <= 127 + 16
        return Grid(8, self.block, half=half)

    def codes(self, start: int, stop: int, grid: Grid) -> Codes:
        """Return rows [start, stop) on ``grid``, which is its own or finer."""
        codes = (self._halves(start, stop).astype(np.int16) + 128).astype(np.uint8)
        scales = self._scales(start, stop) * np.float32(0.5)
        return fitted(Codes(codes, scales, None), Grid(8, self.block), grid)

    def part(self, name: str, first: int, count: int) -> Fp4Weight:
        """Return ``count`` rows, from ``first`` on, as a weight of its own."""
        return replace(self, name=name, shape=(count, self.shape[1]), first=self.first + first)

    def _halves(self, start: int, stop: int) -> Array:
        packed = self.packed.raw(self.first + start, self.first + stop).view(np.uint8)
        packed = packed.reshape(stop - start, -1)
        both = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
        return FP4_HALVES[both.reshape(stop - start, -1)]

    def _exponents(self, start: int, stop: int) -> Array:
        found = self.scales.raw(self.first + start, self.first + stop).view(np.uint8)
        return found.reshape(stop - start, -1)

    def _scales(self, start: int, stop: int) -> Floats:
        if self.powers:
            exponents = self._exponents(start, stop).astype(np.int32)
            found = np.ldexp(np.float32(1), exponents - 127).astype(np.float32)
            found[exponents == _NAN_SCALE] = np.nan
            return found
        scales = self.scales.rows(self.first + start, self.first + stop).reshape(stop - start, -1)
        if self.divisor is not None:
            scales = scales / self.divisor.rows(0, 1)
        if self.factor is not None:
            scales = scales * self.factor.rows(0, 1)
        return np.asarray(scales, np.float32)
