"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

The gguf package reads files too, but maps them into memory, where a file that shrinks ends the process, and
believes every count that a header states. Here a header is read through a buffer: no count is believed before the
file has bytes for it, and nothing of the size that it states is allocated.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ortlm._utils.checked_json import shown
from ortlm.checkpoint import files
from ortlm.dtypes import Array
from ortlm.errors import BadCheckpoint

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Far beyond any file there is: tokenizers with a million tokens stay below a tenth of it.
_MOST_HEADER_BYTES = 256 << 20
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 1 << 16, 1 << 20, 1 << 22
_MOST_NAME = 1 << 16
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# The numbers of value types, as numpy reads them; strings and arrays have no size of their own.
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """A list of numbers, or of truth values, in metadata: equal to nothing else, as arrays of numpy are not."""

    values: Array

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"[{', '.join(str(v) for v in self.values[:8])}{', ...' if len(self) > 8 else ''}]"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header describes it: ``shape`` [rows, columns], the number of its type, its first byte.

    ``name`` is what the file calls it, ``stamp`` the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    stamp: files.Stamp


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the weights of one GGUF file; ``bytes`` is the size of the whole file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    bytes: int


def is_gguf(path: Path) -> bool:
    """Whether there is something called ``path`` that is called, or begins, like a GGUF file."""
    try:
        if path.name.lower().endswith(".gguf"):
            return os.path.lexists(path)
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read_header(path: Path) -> Header:
    """Return the header of the GGUF file ``path``.

    Values of metadata are str, int, float, bool, list of str, or Numbers. Raises BadCheckpoint if the file
    is no GGUF, of an unknown version, truncated, or contradicts itself.
    """
    with files.open_weights(path.parent, path.name) as file:
        stamp = files.Stamp.of(file, path)
        size = os.fstat(file.fileno()).st_size
        read = _Reader(io.BufferedReader(file, 1 << 20), path, size)
        return _header(read, stamp)


class _Reader:
    """Reads numbers and strings one after the other, never past the end of the file or of what headers take."""

    def __init__(self, stream: io.BufferedReader, path: Path, size: int) -> None:
        self._stream, self.size = stream, size
        self.path = files.shown(path)
        self.at = 0

    def bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise BadCheckpoint(
                f"{self.path} has {self.size:,} bytes and ends inside {what}: it is truncated, or its header is "
                "damaged. Download it again."
            )
        if self.at + count > _MOST_HEADER_BYTES:
            raise BadCheckpoint(
                f"{self.path}: {what} makes the header longer than {_MOST_HEADER_BYTES:,} bytes, which no "
                "model's is. It is damaged; download it again."
            )
        try:
            raw = self._stream.read(count)
        except OSError as error:
            raise BadCheckpoint(
                f"{self.path} cannot be read: {error.strerror or error}. Copy or download it again."
            ) from error
        if len(raw) < count:
            raise BadCheckpoint(f"{self.path} ends inside {what}: it has become shorter. Download it again.")
        self.at += count
        return raw

    def number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self.bytes(struct.calcsize(form), what))
        return int(value)

    def count(self, most: int, each: int, what: str, form: str = "<Q") -> int:
        """Read how many things of at least ``each`` bytes follow."""
        found = self.number(form, what)
        if found > most or found * each > self.size - self.at:
            raise BadCheckpoint(
                f"{self.path}: its header says {found:,} for {what}, and there are {self.size - self.at:,} bytes "
                "left. It is damaged or truncated; download it again."
            )
        return found

    def text(self, what: str, most: int = _MOST_HEADER_BYTES) -> str:
        raw = self.bytes(self.count(most, 1, f"the bytes of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise BadCheckpoint(
                f"{self.path}: {what} is not text in UTF-8 ({raw[:40]!r}). It is damaged; download it again."
            ) from error


def _header(read: _Reader, stamp: files.Stamp) -> Header:
    magic = read.bytes(4, "its magic number")
    if magic != MAGIC:
        raise BadCheckpoint(
            f"{read.path} is no GGUF file: it begins with {magic!r}, not with {MAGIC!r}. Usual cause: a download "
            "that brought a web page, or another format."
        )
    version = read.number("<I", "its version")
    if version & 0xFFFF == 0 and version:
        raise BadCheckpoint(
            f"{read.path} was written for big-endian machines, which ortlm does not read. Use the usual file."
        )
    if version not in _VERSIONS:
        raise BadCheckpoint(
            f"{read.path} has version {version} of GGUF; ortlm reads {' and '.join(map(str, _VERSIONS))}. "
            "Convert the model again with a current llama.cpp."
        )
    tensors = read.count(_MOST_TENSORS, 24, "the number of tensors")
    keys = read.count(_MOST_KEYS, 13, "the number of metadata keys")
    metadata: dict[str, Any] = {}
    for at in range(keys):
        key = read.text(f"the name of metadata key {at}", _MOST_NAME)
        if key in metadata:
            raise BadCheckpoint(
                f"{read.path} has the metadata key {shown(key)} twice, and nobody knows which one counts."
            )
        metadata[key] = _value(read, shown(key))
    infos = [_tensor(read, at) for at in range(tensors)]
    step = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(step, int) or isinstance(step, bool) or not 8 <= step <= 1 << 20 or step & (step - 1):
        raise BadCheckpoint(
            f'{read.path}: "general.alignment" is {step!r}, expected a power of two from 8 to {1 << 20:,}.'
        )
    first = -(-read.at // step) * step
    found: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise BadCheckpoint(f"{read.path} has the tensor {shown(name)} twice. It is damaged.")
        if offset % step:
            raise BadCheckpoint(
                f"{read.path}: the tensor {shown(name)} begins at byte {offset:,} of the weights, expected a "
                f"multiple of {step}. It is damaged; download it again."
            )
        found[name] = TensorInfo(name, shape, kind, first + offset, stamp)
    return Header(stamp.path, metadata, tuple(found.values()), read.size)


def _value(read: _Reader, key: str) -> Any:
    kind = read.number("<I", f"the type of {key}")
    if kind == _STRING:
        return read.text(f"the value of {key}")
    if kind in _NUMBERS:
        (value,) = _numbers(read, kind, 1, key)
        # The shortest decimal of a float32 is what the model's author wrote: 1e-05, not 9.99999974e-06.
        return float(str(value)) if kind == _FLOAT32 else value.item()
    if kind != _ARRAY:
        raise _unknown(read, kind, key)
    inner = read.number("<I", f"the type of {key}")
    if inner == _STRING:
        count = read.count(_MOST_STRINGS, 8, f"the number of strings in {key}")
        return [read.text(f"string {i} of {key}") for i in range(count)]
    if inner not in _NUMBERS:
        raise _unknown(read, inner, key)
    width = np.dtype(_NUMBERS[inner]).itemsize
    count = read.count(_MOST_HEADER_BYTES, width, f"the number of values in {key}")
    return Numbers(_numbers(read, inner, count, key))


def _numbers(read: _Reader, kind: int, count: int, key: str) -> Array:
    form = np.dtype(_NUMBERS[kind])
    raw = read.bytes(count * form.itemsize, f"the value of {key}")
    if kind == _BOOL:
        return np.asarray(np.frombuffer(raw, np.uint8) != 0)
    return np.frombuffer(raw, form)


def _unknown(read: _Reader, kind: int, key: str) -> BadCheckpoint:
    what = "an array of arrays" if kind == _ARRAY else f"of the unknown type {kind}"
    return BadCheckpoint(
        f"{read.path}: the value of {key} is {what}. The file is damaged, or newer than this version of ortlm."
    )


def _tensor(read: _Reader, at: int) -> tuple[str, tuple[int, ...], int, int]:
    name = read.text(f"the name of tensor {at}", _MOST_NAME)
    dimensions = read.number("<I", f"the dimensions of {shown(name)}")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise BadCheckpoint(
            f"{read.path}: the tensor {shown(name)} has {dimensions} dimensions, expected 1 to "
            f"{_MOST_DIMENSIONS}. It is damaged; download it again."
        )
    sizes = struct.unpack(f"<{dimensions}Q", read.bytes(8 * dimensions, f"the shape of {shown(name)}"))
    if not all(sizes) or math.prod(sizes) >= 1 << 48:
        raise BadCheckpoint(
            f"{read.path}: the tensor {shown(name)} has the shape {list(sizes)}, which cannot be. It is damaged; "
            "download it again."
        )
    kind = read.number("<I", f"the type of {shown(name)}")
    offset = read.number("<Q", f"the place of {shown(name)}")
    return name, tuple(reversed(sizes)), kind, offset
