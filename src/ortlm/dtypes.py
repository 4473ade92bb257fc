"""One table of element types: our name, ONNX, numpy and safetensors.

Light on purpose: both halves of ortlm import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type under all its names."""

    name: str
    onnx: int
    ort: str
    numpy: np.dtype[Any]
    safetensors: str

    @property
    def bytes(self) -> int:
        """Size of one element in bytes."""
        return int(self.numpy.itemsize)


_TABLE = (
    DType("fp32", 1, "tensor(float)", np.dtype(np.float32), "F32"),
    DType("fp16", 10, "tensor(float16)", np.dtype(np.float16), "F16"),
    DType("bf16", 16, "tensor(bfloat16)", np.dtype(ml_dtypes.bfloat16), "BF16"),
    DType("fp64", 11, "tensor(double)", np.dtype(np.float64), "F64"),
    DType("uint8", 2, "tensor(uint8)", np.dtype(np.uint8), "U8"),
    DType("int8", 3, "tensor(int8)", np.dtype(np.int8), "I8"),
    DType("int16", 5, "tensor(int16)", np.dtype(np.int16), "I16"),
    DType("int32", 6, "tensor(int32)", np.dtype(np.int32), "I32"),
    DType("int64", 7, "tensor(int64)", np.dtype(np.int64), "I64"),
    DType("bool", 9, "tensor(bool)", np.dtype(np.bool_), "BOOL"),
    DType("fp8_e4m3", 17, "tensor(float8e4m3fn)", np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3"),
    DType("fp8_e5m2", 19, "tensor(float8e5m2)", np.dtype(ml_dtypes.float8_e5m2), "F8_E5M2"),
    DType("e8m0", 24, "tensor(float8e8m0)", np.dtype(ml_dtypes.float8_e8m0fnu), "F8_E8M0"),
)

BY_NAME = {d.name: d for d in _TABLE}
BY_ONNX = {d.onnx: d for d in _TABLE}
BY_ORT = {d.ort: d for d in _TABLE}
BY_SAFETENSORS = {d.safetensors: d for d in _TABLE}


def dtype(name: str) -> DType:
    """Return the element type called ``name``; ``KeyError`` if there is none."""
    return BY_NAME[name]


# What a number's bits, moved to where float32 has its exponent and mantissa, lack of its size.
_FP16_SCALE = np.float32(2.0**112)


def as_float32(array: Array) -> NDArray[np.float32]:
    """Return the floating-point ``array`` in float32: itself if it is that already.

    numpy takes fp16 number by number, which for a row of logits is a tenth of a GPU's step.
    """
    if array.dtype != np.float16:
        same: NDArray[np.float32] = array.astype(np.float32, copy=False)
        return same
    bits = np.left_shift(array.view(np.int16), 13, dtype=np.int32)
    # The sign came along through the highest bits; the three below it are none of the exponent's.
    bits &= np.int32(-0x70002000)
    found: NDArray[np.float32] = bits.view(np.float32)
    found *= _FP16_SCALE
    if found.size and not -65536 < found.min() <= found.max() < 65536:
        # Infinities and what is no number have an exponent of their own.
        return array.astype(np.float32)
    return found
