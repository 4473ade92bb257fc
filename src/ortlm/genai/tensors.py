"""Tensors as this API hands them around."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.genai.errors import GenaiError, instance, text


class ElementType(IntEnum):
    """Element types with ONNX's numbers."""

    float32 = 1
    uint8 = 2
    int8 = 3
    uint16 = 4
    int16 = 5
    int32 = 6
    int64 = 7
    bool = 9
    float16 = 10
    float64 = 11
    uint32 = 12
    uint64 = 13


class Tensor:
    """A copy of a numpy array; what ``Tokenizer.encode_batch`` makes knows how long each row really is.

    Raises GenaiError for an array whose elements are no numbers.
    """

    def __init__(self, array: NDArray[Any], *, lengths: Sequence[int] | None = None) -> None:
        self._array: NDArray[Any] = np.array(instance(array, np.ndarray, "what a Tensor holds"))
        self.lengths = None if lengths is None else tuple(lengths)
        if self._array.dtype.name not in ElementType.__members__:
            raise GenaiError(
                f"a tensor cannot hold {self._array.dtype}; it may be {', '.join(ElementType.__members__)}."
            )

    def shape(self) -> list[int]:
        """Return the size of each dimension."""
        return list(self._array.shape)

    def type(self) -> ElementType:
        """Return the element type."""
        return ElementType[self._array.dtype.name]

    def as_numpy(self) -> NDArray[Any]:
        """Return a copy of the contents."""
        return self._array.copy()

    def data(self) -> object:
        """Return a PyCapsule around the address of the contents, which the tensor must outlive."""
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return capsule(self._array.ctypes.data, None, None)


class NamedTensors:
    """Tensors by name."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def __setitem__(self, name: str, tensor: Any) -> None:
        self._tensors[text(name, "a tensor's name")] = (
            tensor if isinstance(tensor, Tensor) else Tensor(tensor)
        )

    def __getitem__(self, name: str) -> Tensor:
        self._check(name)
        return self._tensors[name]

    def __delitem__(self, name: str) -> None:
        # As there, to take away what is not there is no error.
        self._tensors.pop(text(name, "a tensor's name"), None)

    def __contains__(self, name: object) -> bool:
        return text(name, "a tensor's name") in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> list[str]:
        """Return the names."""
        return list(self._tensors)

    def _check(self, name: str) -> None:
        if text(name, "a tensor's name") not in self._tensors:
            raise GenaiError(f"there is no tensor {name!r}; there is {', '.join(self._tensors) or 'none'}.")
