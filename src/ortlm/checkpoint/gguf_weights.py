"""Tensors of GGUF files, dequantized a few rows at a time.

How blocks are dequantized is the gguf package's business: its values are those of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ortlm._utils.checked_json import shown
from ortlm.checkpoint import files
from ortlm.checkpoint.gguf_header import TensorInfo
from ortlm.checkpoint.quantized_weight import Codes, Grid, QuantizedWeight, fitted
from ortlm.checkpoint.safetensors import check_finite
from ortlm.dtypes import Array
from ortlm.errors import BadCheckpoint, UnsupportedModel

# What is read; the package dequantizes more, of which nothing here was tested.
READ = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip

# Types whose blocks are a scale before 32 whole numbers, and how many bits those take around a zero in the middle.
WHOLE = {"Q4_0": 4, "Q5_0": 8, "Q8_0": 8, "IQ4_NL": 8, "MXFP4": 8}
# The one whose scale is a power of two in a byte (E8M0), where it is fp16 in the others.
_POWERS = "MXFP4"
# Types that models are trained in, so that finding other codes would lose something.
TRAINED_IN = ("MXFP4",)
# Of 2**(byte - 128) fp16 holds those from 2**-24 to 2**15.
_HALF_POWERS = (104, 143)
_FLOATS = ("F32", "F16", "BF16")
_BLOCK = 32
# Bytes that are read at once where a whole tensor is looked through.
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight(QuantizedWeight):
    """A tensor of a GGUF file by the name that a Hugging Face checkpoint has for it; values are float32.

    ``kind`` is its type's name, ``stored_name`` what the file calls it, ``first`` the row of that tensor where
    this one begins. ``heads``: the rows of so many heads lie there with the two halves of each head interleaved.
    """

    kind: str = "F32"
    stored_name: str = ""
    first: int = 0
    heads: int | None = None

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.shape[0] * self._row_bytes()

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32; a vector's rows are its elements.

        Raises BadCheckpoint if the file ends early, or was written to since its header was read.
        """
        return self._in_order(start, stop, self._stored)

    def grid(self) -> Grid | None:
        """Return the grid that holds its values exactly, of types in ``WHOLE``."""
        if self.kind not in WHOLE:
            return None
        return Grid(WHOLE[self.kind], _BLOCK, half=self.kind != _POWERS or self._half_powers())

    def codes(self, start: int, stop: int, grid: Grid) -> Codes:
        """Return rows [start, stop) on ``grid``, which is its own or finer; see ``grid``."""

        def stored(low: int, high: int) -> Array:
            raw = self.raw_rows(low, high)
            values = self._dequantized(raw)
            check_finite(values, self)
            scales = self._scales(raw)
            blocks = values.reshape(high - low, scales.shape[1], -1)
            whole = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
            whole = np.rint(whole)
            # The package multiplies just so; if it ever does otherwise, nothing is carried over wrongly.
            assert np.array_equal(whole * scales, blocks)
            return np.concatenate([whole.reshape(high - low, -1), scales[..., 0]], axis=1)

        found = self._in_order(start, stop, stored)
        own = Grid(WHOLE[self.kind], _BLOCK)
        codes = (found[:, : self.shape[1]] + np.float32(own.zero)).astype(np.uint8)
        return fitted(Codes(codes, np.ascontiguousarray(found[:, self.shape[1] :]), None), own, grid)

    def _scales(self, raw: Array) -> Array:
        """Return the scales, float32 [rows, blocks, 1], in the bytes of rows of a type in ``WHOLE``."""
        _, size = block_of(self.kind)
        blocks = raw.reshape(len(raw), -1, size)
        if self.kind == _POWERS:
            return np.ldexp(np.float32(1), blocks[..., :1].astype(np.int32) - 128)
        return np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)

    def _half_powers(self) -> bool:
        """Whether fp16 holds every scale, of which there is at least one."""
        low, high = _HALF_POWERS
        _, size = block_of(self.kind)
        step = max(1, _PIECE_BYTES // self._row_bytes())
        for start in range(0, self.shape[0], step):
            raw = self.raw_rows(start, min(start + step, self.shape[0]))
            powers = raw.reshape(-1, size)[:, 0]
            if powers.min() < low or powers.max() > high:
                return False
        return True

    def _in_order(self, start: int, stop: int, stored: Callable[[int, int], Array]) -> Array:
        """Return rows [start, stop), which ``stored`` reads as they lie in the file."""
        if self.heads is None:
            return stored(start, stop)
        size = self.shape[0] // self.heads
        low, high = start // size * size, -(-stop // size) * size
        row = np.arange(start, stop)
        half = size // 2
        # Row (half, i) of a head lies at row 2 i + half of it.
        place = row // size * size + row % half * 2 + row % size // half
        return np.asarray(stored(low, high)[place - low])

    def raw_rows(self, start: int, stop: int) -> Array:
        """Return the bytes, uint8 [rows, row bytes], of rows [start, stop) as they lie in the file."""
        row = self._row_bytes()
        raw = np.empty((stop - start, row), np.uint8)
        with self.stamp.open() as stream:
            self._read(stream, raw.reshape(-1), (self.first + start) * row)
        return raw

    def _stored(self, start: int, stop: int) -> Array:
        return self._dequantized(self.raw_rows(start, stop)).reshape(stop - start, *self.shape[1:])

    def _dequantized(self, raw: Array) -> Array:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        # A scale may be infinite or no number in a damaged file; whoever takes the rows looks at them.
        with np.errstate(all="ignore"):
            found = dequantize(raw, GGMLQuantizationType[self.kind])
        return np.asarray(found, np.float32)

    def _row_bytes(self) -> int:
        elements, size = block_of(self.kind)
        return math.prod(self.shape[1:]) * size // elements


def block_of(kind: str) -> tuple[int, int]:
    """Return how many elements a block of the type ``kind`` has, and how many bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(elements), int(size)


def kind_of(info: TensorInfo) -> str:
    """Return the name of a tensor's type.

    Raises UnsupportedModel if it is not read, BadCheckpoint if the tensor does not fit it or its file.
    """
    from gguf import GGMLQuantizationType

    where = f"weight {shown(info.name)} in {files.shown(info.stamp.path)}"
    name: str | None = next((k.name for k in GGMLQuantizationType if k.value == info.kind), None)
    if name is None or name not in READ:
        told = f"{name} ({info.kind})" if name else f"with the number {info.kind}, which is not known"
        raise UnsupportedModel(
            f"{where} is of the type {told}. Types that are read: {', '.join(READ)}. Use a file in one of them."
        )
    elements, size = block_of(name)
    if len(info.shape) == 1 and elements > 1:
        raise UnsupportedModel(
            f"{where} is a vector of the type {name}; ortlm reads vectors in {', '.join(_FLOATS)}. Convert the "
            "model again with a current llama.cpp."
        )
    if info.shape[-1] % elements:
        raise BadCheckpoint(
            f"{where} has rows of {info.shape[-1]:,} elements, which are no whole blocks of {elements} as {name} "
            "has them. The file is damaged; download it again."
        )
    end = info.offset + math.prod(info.shape) // elements * size
    if end > info.stamp.state[2]:
        raise BadCheckpoint(
            f"{where} ends at byte {end:,}, and the file has {info.stamp.state[2]:,}: it is truncated. Download "
            "it again."
        )
    return name
