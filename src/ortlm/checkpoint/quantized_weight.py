"""Weights that a checkpoint holds in codes: what all formats have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array


@dataclass(frozen=True, slots=True)
class Grid:
    """Values on a uniform grid, as MatMulNBits has them: (code - zero) · scale.

    Codes have ``bits``, each ``block`` inputs of a row share a scale and a zero. ``symmetric``: every zero is
    2**(bits-1). ``half``: fp16 holds every scale.
    """

    bits: int
    block: int
    symmetric: bool = True
    half: bool = True

    @property
    def zero(self) -> int:
        """The code in the middle."""
        return 1 << (self.bits - 1)


class Codes(NamedTuple):
    """Rows on a grid: ``codes`` uint8 [rows, inputs], ``scales`` float32 and ``zeros`` uint8 [rows, blocks].

    ``zeros`` is None if all are in the middle.
    """

    codes: Array
    scales: Array
    zeros: Array | None


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight(Weight):
    """A weight that lies in its checkpoint in codes; ``rows`` dequantizes it.

    ``kind`` is what reports call its format. ``calibrated``: its codes were found for the data that a model reads,
    or by training, so that finding them again would lose what that gained.
    """

    kind: str = ""
    calibrated: bool = False

    def grid(self) -> Grid | None:
        """Return the grid that holds its values exactly, None if there is none that ONNX Runtime knows."""
        return None

    def codes(self, start: int, stop: int, grid: Grid) -> Codes:
        """Return rows [start, stop) on ``grid``, which is its own or finer."""
        raise NotImplementedError

    def columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop) of a matrix, transposed: float32 [columns, rows]."""
        step = max(1, (1 << 19) // self.shape[1])
        parts = [
            self.rows(a, min(a + step, self.shape[0]))[:, start:stop] for a in range(0, self.shape[0], step)
        ]
        return np.ascontiguousarray(np.concatenate(parts).T)


@dataclass(frozen=True, slots=True, eq=False)
class TransposedWeight(QuantizedWeight):
    """A matrix [in, out] whose codes lie as those of ``inner`` [out, in]."""

    inner: QuantizedWeight = field(kw_only=True)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.inner.bytes

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), dequantized, as float32."""
        return self.inner.columns(start, stop)

    def columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop), transposed: float32 [columns, rows]."""
        return self.inner.rows(start, stop)


def fitted(found: Codes, own: Grid, wanted: Grid) -> Codes:
    """Return ``found``, which is on the grid ``own``, on one that is finer: more bits, smaller blocks, zeros."""
    shift = np.uint8(wanted.zero - own.zero)
    codes, scales, zeros = found.codes + shift, found.scales, found.zeros
    if own.block != wanted.block:
        blocks = -(-codes.shape[1] // wanted.block)
        scales = np.repeat(scales, own.block // wanted.block, axis=1)[:, :blocks]
        if zeros is not None:
            zeros = np.repeat(zeros, own.block // wanted.block, axis=1)[:, :blocks]
    if wanted.symmetric:
        zeros = None
    elif zeros is None:
        zeros = np.full(scales.shape, wanted.zero, np.uint8)
    else:
        zeros = zeros + shift
    return Codes(codes, np.ascontiguousarray(scales), zeros)
