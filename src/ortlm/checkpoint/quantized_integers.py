"""Whole numbers as quantized checkpoints hold them, and the weights that they make with scales and zeros.

Every format packs them in an order of its own. Here they are rows of a matrix [out, in], whichever way they lie.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from ortlm.checkpoint.quantized_weight import Codes, Grid, QuantizedWeight, fitted
from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array

# Blocks that every target has a kernel for, the largest first, and one that some lack.
_BLOCKS = (128, 64, 32, 16)
# Rows of scales and zeros that are looked at at once.
_ROWS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """A matrix [out, n] of numbers of ``bits``, as ``tensor`` holds it; nothing is read before ``rows``.

    ``transposed``: it lies there as [n, out]. Several numbers share a word, the first in the lowest bits, and
    ``along`` is the axis of the tensor that is shorter for it. ``order`` says which place in a word each of its
    numbers has. ``plus`` is added to each word. ``signed`` numbers become the distance from the least one.
    """

    tensor: Weight
    bits: int
    count: int
    along: int = 1
    transposed: bool = False
    order: tuple[int, ...] | None = None
    plus: int = 0
    signed: bool = False

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop): uint8 [stop - start, n]."""
        per = self.tensor.dtype.bytes * 8 // self.bits
        # The axis of the tensor on which the rows of the matrix lie.
        axis = 1 if self.transposed else 0
        packed = axis == self.along
        low, high = (start // per, -(-stop // per)) if packed else (start, stop)
        words = self.tensor.raw_columns(low, high) if self.transposed else self.tensor.raw(low, high)
        if self.along == 0:
            words = words.T
        found = self._numbers(words)
        if packed:
            found = found[:, start - low * per : stop - low * per]
        if self.transposed == (self.along == 1):
            found = found.T
        return np.ascontiguousarray(found[:, : self.count])

    def _numbers(self, words: Array) -> Array:
        """Return the numbers in ``words``, along the last axis."""
        words = np.ascontiguousarray(words)
        unsigned = words.view(f"u{words.itemsize}")
        if self.plus:
            unsigned = unsigned + np.array(self.plus, unsigned.dtype)
        found = _split(unsigned.view(np.uint8), self.bits)
        if self.order is not None:
            found = found.reshape(len(found), -1, len(self.order))[..., list(self.order)]
            found = found.reshape(len(found), -1)
        if self.signed:
            found = found ^ np.uint8(1 << (self.bits - 1))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class IntegerWeight(QuantizedWeight):
    """(code - zero) · scale, with a scale and a zero for the inputs of each group.

    ``scales`` is a tensor [out, groups], or [groups, out] if ``scales_transposed``; ``zeros`` None if they are in
    the middle. ``groups`` int32 [in] is the group of each input.
    """

    integers: Integers = field(kw_only=True)
    scales: Weight = field(kw_only=True)
    zeros: Integers | None = None
    groups: Array = field(kw_only=True)
    scales_transposed: bool = False
    stored_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Size in the file, with scales and zeros."""
        return self.stored_bytes

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), dequantized, as float32."""
        found = self.integers.rows(start, stop).astype(np.float32)
        if self.zeros is None:
            found -= np.float32(1 << (self.integers.bits - 1))
        else:
            found -= self.zeros.rows(start, stop).astype(np.float32)[:, self.groups]
        with np.errstate(over="ignore", invalid="ignore"):
            found *= self._scales(start, stop)[:, self.groups]
        return found

    def grid(self) -> Grid | None:
        """Return the grid that holds its values exactly, None if groups are no blocks of inputs."""
        block = next((size for size in _BLOCKS if self._in_blocks(size)), None)
        if block is None:
            return None
        return Grid(self.integers.bits, block, self._symmetric(), self._half())

    def codes(self, start: int, stop: int, grid: Grid) -> Codes:
        """Return rows [start, stop) on ``grid``, which is its own or finer."""
        heads = self.groups[:: grid.block]
        zeros = None if self.zeros is None else np.ascontiguousarray(self.zeros.rows(start, stop)[:, heads])
        scales = np.ascontiguousarray(self._scales(start, stop)[:, heads])
        own = Grid(self.integers.bits, grid.block, self.zeros is None)
        return fitted(Codes(self.integers.rows(start, stop), scales, zeros), own, grid)

    def _scales(self, start: int, stop: int) -> Array:
        if self.scales_transposed:
            return self.scales.columns(start, stop)
        if self.scales.shape[0] == 1 < self.shape[0]:
            return np.repeat(self.scales.rows(0, 1).reshape(1, -1), stop - start, axis=0)
        return self.scales.rows(start, stop).reshape(stop - start, -1)

    def _in_blocks(self, size: int) -> bool:
        """Whether all inputs of a block of ``size`` are of one group."""
        heads = np.repeat(self.groups[::size], size)[: len(self.groups)]
        return np.array_equal(heads, self.groups)

    def _symmetric(self) -> bool:
        if self.zeros is None:
            return True
        middle = 1 << (self.integers.bits - 1)
        return all((self.zeros.rows(a, b) == middle).all() for a, b in self._pieces())

    def _half(self) -> bool:
        if self.scales.dtype.name == "fp16":
            return True
        for a, b in self._pieces():
            found = self._scales(a, b)
            with np.errstate(over="ignore"):
                if not np.array_equal(found.astype(np.float16).astype(np.float32), found):
                    return False
        return True

    def _pieces(self) -> list[tuple[int, int]]:
        return [(a, min(a + _ROWS, self.shape[0])) for a in range(0, self.shape[0], _ROWS)]


def _split(packed: Array, bits: int) -> Array:
    """Return the numbers of ``bits`` in the bytes ``packed`` [..., n], the first in the lowest bits."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    found = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return found.reshape(*packed.shape[:-1], -1)


@functools.lru_cache(64)
def even_groups(inputs: int, size: int) -> Array:
    """Return the group of each input where ``size`` of them that lie together share a scale."""
    found = np.arange(inputs, dtype=np.int32) // np.int32(size)
    found.setflags(write=False)
    return found
