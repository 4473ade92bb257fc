"""Reads tensors out of safetensors files a few rows at a time, without mapping them into memory.

Plain reads into small buffers keep resident memory independent of the file's size, and a file that shrinks
while it is read gives an error instead of a crash.
"""

from __future__ import annotations

import io
import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ortlm._utils.checked_json import parse_object, shown
from ortlm._utils.formatting import printable
from ortlm.checkpoint import files
from ortlm.dtypes import BY_SAFETENSORS, Array, DType
from ortlm.errors import BadCheckpoint

FLOATS = ("fp32", "fp16", "bf16")
# What is read at once of a matrix whose columns are wanted, and the longest rows that are read whole for it.
_READ_BYTES, _SHORT_BYTES = 1 << 20, 1 << 14


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a checkpoint; nothing is read before ``rows`` is called.

    ``added`` is what the file's format adds to every value of it, which the architecture does not know of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    stamp: files.Stamp
    offset: int
    added: float = 0.0

    @property
    def file(self) -> Path:
        """Where it lies."""
        return self.stamp.path

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.bytes

    def at(self, index: int) -> Weight:
        """Return what lies at ``index`` of the first axis: the matrix of one expert, for example."""
        return replace(self, shape=self.shape[1:], offset=self.offset + index * (self.bytes // self.shape[0]))

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32; a vector's rows are its elements.

        Raises BadCheckpoint if the file ends early, or was written to since its header was read.
        """
        return _to_float32(self.raw(start, stop))

    def columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop) of a matrix, transposed: float32 [columns, rows]."""
        return np.ascontiguousarray(_to_float32(self.raw_columns(start, stop)).T)

    def raw(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in the element type of the file."""
        width = math.prod(self.shape[1:]) * self.dtype.bytes
        raw = np.empty((stop - start) * width, np.uint8)
        # A handle of its own: several threads read at once, and not every system has pread.
        with self.stamp.open() as stream:
            self._read(stream, raw, start * width)
        return raw.view(self.dtype.numpy).reshape(stop - start, *self.shape[1:])

    def raw_columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop) of a matrix, [rows, columns], in the element type of the file."""
        rows, row = self.shape[0], self.shape[1] * self.dtype.bytes
        first, width = start * self.dtype.bytes, (stop - start) * self.dtype.bytes
        raw = np.empty((rows, width), np.uint8)
        # Whole rows, if they are short, and many at once: that is faster than a read for each.
        step = max(1, _READ_BYTES // row) if row <= _SHORT_BYTES else 1
        with self.stamp.open() as stream:
            if step == 1:
                for i in range(rows):
                    self._read(stream, raw[i], i * row + first)
            else:
                for i in range(0, rows, step):
                    whole = np.empty((min(step, rows - i), row), np.uint8)
                    self._read(stream, whole.reshape(-1), i * row)
                    raw[i : i + step] = whole[:, first : first + width]
        return raw.reshape(-1).view(self.dtype.numpy).reshape(rows, stop - start)

    def _read(self, stream: io.FileIO, raw: Array, at: int) -> None:
        """Fill ``raw`` (uint8) with the bytes of the tensor from ``at`` on."""
        view = memoryview(raw.data)
        try:
            stream.seek(self.offset + at)
            while view:
                got = stream.readinto(view)
                if not got:
                    raise BadCheckpoint(
                        f"{files.shown(self.file)} ends inside weight {shown(self.name)}: it is truncated."
                    )
                view = view[got:]
        except OSError as error:
            raise BadCheckpoint(
                f"{files.shown(self.file)} cannot be read: {error.strerror or error}. Copy or download it again."
            ) from error


def _to_float32(raw: Array) -> Array:
    if raw.dtype == BY_SAFETENSORS["BF16"].numpy:
        # bf16 is the upper half of a float32: shifting is several times faster than a generic cast.
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return raw.astype(np.float32, copy=False)


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


def read_header(folder: Path, name: str) -> dict[str, Weight]:
    """Return the tensors of the safetensors file ``name`` in ``folder`` by name.

    Raises BadCheckpoint if the file is damaged: the safetensors library checks header, offsets and length.
    """
    path = folder / name
    with files.open_file(folder, name) as stream:
        stamp = files.Stamp.of(stream, path)
        size = os.fstat(stream.fileno()).st_size
        try:
            with safe_open(stamp.real, framework="numpy"):
                pass
            head = io.BufferedReader(stream)
            (length,) = struct.unpack("<Q", head.read(8))
            raw = head.read(length).decode()
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            reason = printable(str(error)).replace("\n", " ")
            raise BadCheckpoint(
                f"{files.shown(path)} is no complete safetensors file ({reason}); it has {size:,} bytes. "
                "Usual cause: a download that stopped early. Delete the file and download it again."
            ) from error
    header = parse_object(raw, where=files.shown(path), error=BadCheckpoint)
    weights = {}
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        found = BY_SAFETENSORS.get(entry["dtype"])
        if found is None:
            raise BadCheckpoint(
                f"weight {shown(tensor)} in {files.shown(path)} has element type {shown(entry['dtype'])}; ortlm "
                "reads BF16, F16 and F32. Use the unquantized checkpoint of this model."
            )
        shape = tuple(entry["shape"])
        weights[tensor] = Weight(tensor, shape, found, stamp, 8 + length + entry["data_offsets"][0])
    return weights
