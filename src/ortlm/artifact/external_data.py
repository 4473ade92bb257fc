"""Where the weights of a graph lie, checked before ONNX Runtime reads them: within the artifact's folder.

ONNX Runtime checks this too, each version differently, and not for graphs that it is given as bytes. Only what
says where weights lie is read here; nothing of a graph is understood beyond that.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

from ortlm.artifact.json_values import inside
from ortlm.errors import BadArtifact

# Numbers of fields in onnx.proto, by message: those that lead to tensors.
_MODEL_GRAPH, _MODEL_FUNCTIONS, _MODEL_TRAINING = 7, 25, 20
_GRAPH = {1: "node", 5: "tensor", 15: "sparse"}
_SPARSE = {1: "tensor", 2: "tensor"}
_FUNCTION = {7: "node"}
_NODE = {5: "attribute"}
_ATTRIBUTE = {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"}
_TRAINING = {1: "graph", 2: "graph"}
_MODEL = {_MODEL_GRAPH: "graph", _MODEL_FUNCTIONS: "function", _MODEL_TRAINING: "training"}
_INNER = {
    "model": _MODEL,
    "graph": _GRAPH,
    "sparse": _SPARSE,
    "function": _FUNCTION,
    "node": _NODE,
    "attribute": _ATTRIBUTE,
    "training": _TRAINING,
}
_TENSOR_EXTERNAL = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
# ONNX Runtime's mark for weights that are in memory.
_IN_MEMORY = "*/_ORT_MEM_ADDR_/*"
_MOST_DEPTH = 50

_BLOCK_BYTES = 1 << 16
_MOST_LOCATION_BYTES = 4_096


class _Damaged(Exception):
    """What was read is no ONNX file."""


def check_external_data(model: Path | bytes, folder: Path) -> None:
    """Raise BadArtifact unless all weights that the ONNX file or graph ``model`` names lie in ``folder``.

    Links count by where they lead. Raises BadArtifact for what is no ONNX file, too.
    """
    where = model if isinstance(model, Path) else folder
    try:
        locations = sorted(_locations(model))
    except _Damaged as error:
        raise BadArtifact(
            f"ONNX Runtime cannot load {where}: it is no ONNX file ({error}). If the folder was copied, check "
            "that it is complete; else build the model again."
        ) from error
    except OSError as error:
        raise BadArtifact(f"{where} cannot be read: {error.strerror or error}.") from error
    for location in locations:
        if location.startswith("*/") or _IN_MEMORY in location:
            raise BadArtifact(f"{where} names weights at an address in memory, {location[:60]!r}.")
        inside(location, where, folder=folder)


def _locations(model: Path | bytes) -> set[str]:
    try:
        if isinstance(model, bytes):
            return set(_walk(_Reader(io.BytesIO(model)), 0, len(model), "model", 0))
        with model.open("rb", buffering=0) as file:
            return set(_walk(_Reader(file), 0, os.fstat(file.fileno()).st_size, "model", 0))
    except ValueError as error:
        # Another reader might see in it what this one does not.
        raise _Damaged(str(error)) from error


class _Reader:
    """Bytes of a file by their place. Not mapped: a file that shrinks would end the process."""

    def __init__(self, file: io.RawIOBase | io.BytesIO) -> None:
        self._file = file
        self._block, self._start = b"", 0

    def byte(self, at: int) -> int:
        """Return one byte."""
        if not self._start <= at < self._start + len(self._block):
            self._file.seek(at)
            self._start, self._block = at, self._file.read(_BLOCK_BYTES) or b""
            if not self._block:
                raise ValueError("it ends early")
        return self._block[at - self._start]

    def varint(self, at: int) -> tuple[int, int]:
        """Return a number, and the place after it."""
        value = shift = 0
        while shift < 70:
            byte = self.byte(at)
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise ValueError("a number is too long")

    def text(self, at: int, end: int) -> str:
        """Return a short text."""
        if end - at > _MOST_LOCATION_BYTES:
            raise ValueError("the name of a file is too long")
        return bytes(self.byte(i) for i in range(at, end)).decode("utf-8", "surrogateescape")


def _walk(reader: _Reader, at: int, end: int, kind: str, depth: int) -> Iterator[str]:
    """Yield the locations in the message of this kind between two places."""
    if depth > _MOST_DEPTH:
        raise ValueError("it is nested too deeply")
    for number, start, stop in _fields(reader, at, end):
        if kind == "tensor":
            if number == _TENSOR_EXTERNAL:
                entry = {n: (a, b) for n, a, b in _fields(reader, start, stop)}
                if _ENTRY_KEY in entry and reader.text(*entry[_ENTRY_KEY]) == "location":
                    yield reader.text(*entry.get(_ENTRY_VALUE, (0, 0)))
        elif number in _INNER[kind]:
            yield from _walk(reader, start, stop, _INNER[kind][number], depth + 1)


def _fields(reader: _Reader, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, beginning and end of the length-delimited fields of a protobuf message."""
    while at < end:
        key, at = reader.varint(at)
        # Other readers look at 32 bits only.
        key &= 0xFFFFFFFF
        kind = key & 7
        if kind == 2:
            size, at = reader.varint(at)
            if at + size > end:
                raise ValueError("a field ends beyond its message")
            yield key >> 3, at, at + size
            at += size
        elif kind == 0:
            _, at = reader.varint(at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"there is no wire type {kind}")
    if at != end:
        raise ValueError("a field ends beyond its message")
