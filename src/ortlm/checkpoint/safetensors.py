"""Reads tensors out of safetensors files a few rows at a time, without mapping them into memory.

Plain reads into small buffers keep resident memory independent of the file's size, and a file that shrinks
while it is read gives an error instead of a crash.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ortlm.dtypes import BY_SAFETENSORS, Array, DType
from ortlm.errors import BadCheckpoint

FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a checkpoint; nothing is read before ``rows`` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    file: Path
    offset: int

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.bytes

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32; a vector's rows are its elements.

        Raises BadCheckpoint if the file ends early.
        """
        width = math.prod(self.shape[1:]) * self.dtype.bytes
        raw = np.empty((stop - start) * width, np.uint8)
        view = memoryview(raw.data)
        # A handle of its own: several threads read at once, and not every system has pread.
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * width)
            while view:
                got = stream.readinto(view)
                if not got:
                    raise BadCheckpoint(f"{self.file} ends inside weight {self.name!r}: it is truncated.")
                view = view[got:]
        return to_float32(raw, self.dtype).reshape(stop - start, *self.shape[1:])

    def columns(self, start: int, stop: int, rows: slice) -> Array:
        """Return columns [start, stop) of the ``rows`` of a matrix, transposed: float32 [columns, rows]."""
        mapped = np.memmap(self.file, np.uint8, "r", self.offset, (self.bytes,))
        matrix = mapped.view(_storage(self.dtype)).reshape(self.shape)
        part = np.ascontiguousarray(matrix[rows, start:stop].T)
        return to_float32(part.reshape(-1).view(np.uint8), self.dtype).reshape(part.shape)


def _storage(dtype: DType) -> np.dtype[Any]:
    """An element type of the same width that numpy copies natively."""
    return np.dtype(np.uint16) if dtype.name == "bf16" else dtype.numpy


def to_float32(raw: Array, dtype: DType) -> Array:
    """Return the bytes ``raw`` (uint8), read as ``dtype``, as float32."""
    if dtype.name == "bf16":
        # bf16 is the upper half of a float32: shifting is several times faster than a generic cast.
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return raw.view(dtype.numpy).astype(np.float32, copy=False)


def check_finite(rows: Array, weight: Weight) -> None:
    """Raise BadCheckpoint if one of the ``rows`` read from ``weight`` is not a finite number."""
    # A sum is NaN or infinite if any element is, and takes one fast pass; only then look closer, since
    # finite numbers may overflow too.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(rows, dtype=np.float32)
    if not np.isfinite(total):
        bad = rows[~np.isfinite(rows)]
        if bad.size:
            raise BadCheckpoint(
                f"weight {weight.name!r} in {weight.file.name} holds {bad[0]} "
                f"({bad.size:,} such values were found at once): the checkpoint is damaged or training diverged."
            )


def same(one: Weight, other: Weight) -> bool:
    """Whether two weights have the same shape and the same values."""
    if one.shape != other.shape:
        return False
    step = max(1, (1 << 19) // max(1, math.prod(one.shape[1:])))
    return all(
        np.array_equal(
            one.rows(at, min(at + step, one.shape[0])), other.rows(at, min(at + step, one.shape[0]))
        )
        for at in range(0, one.shape[0], step)
    )


def read_header(path: Path) -> dict[str, Weight]:
    """Return the tensors of the safetensors file ``path`` by name.

    Raises BadCheckpoint if the file is damaged: the safetensors library checks header, offsets and length.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(
            f"{path} is no complete safetensors file ({error}); it has {path.stat().st_size:,} bytes. "
            "Usual cause: a download that stopped early. Delete the file and download it again."
        ) from error
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        found = BY_SAFETENSORS.get(entry["dtype"])
        if found is None:
            raise BadCheckpoint(
                f"weight {name!r} in {path} has element type {entry['dtype']}; ortlm reads BF16, F16 and F32. "
                "Use the unquantized checkpoint of this model."
            )
        weights[name] = Weight(
            name, tuple(entry["shape"]), found, path, 8 + length + entry["data_offsets"][0]
        )
    return weights
