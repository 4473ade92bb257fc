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
    DType("int32", 6, "tensor(int32)", np.dtype(np.int32), "I32"),
    DType("int64", 7, "tensor(int64)", np.dtype(np.int64), "I64"),
    DType("bool", 9, "tensor(bool)", np.dtype(np.bool_), "BOOL"),
)

BY_NAME = {d.name: d for d in _TABLE}
BY_ORT = {d.ort: d for d in _TABLE}
BY_SAFETENSORS = {d.safetensors: d for d in _TABLE}


def dtype(name: str) -> DType:
    """Return the element type called ``name``; ``KeyError`` if there is none."""
    return BY_NAME[name]
