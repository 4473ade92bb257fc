"""Where the weights of a graph lie, checked before ONNX Runtime reads them: within the artifact's folder.

ONNX Runtime checks this too, each version differently, and not for graphs that it is given as bytes. Only what
says where weights lie is read here; nothing of a graph is understood beyond that.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

from ortlm._utils.protobuf import Bytes, fields
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
# Files that hold their weights themselves are read in blocks.
_MOST_READ_BYTES = 16 << 20
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
            return set(_walk(model, 0, len(model), "model", 0))
        with model.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return set(_walk(file.read() if size <= _MOST_READ_BYTES else _Blocks(file), 0, size, "model", 0))
    except ValueError as error:
        # Another reader might see in it what this one does not.
        raise _Damaged(str(error)) from error


class _Blocks:
    """Bytes of a file by their place. Not mapped: a file that shrinks would end the process."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._block, self._start = b"", 0

    def __getitem__(self, at: int) -> int:
        if not self._start <= at < self._start + len(self._block):
            self._file.seek(at)
            self._start, self._block = at, self._file.read(_BLOCK_BYTES) or b""
        return self._block[at - self._start]


def _text(data: Bytes, at: int, end: int) -> str:
    """Return a short text."""
    if end - at > _MOST_LOCATION_BYTES:
        raise ValueError("the name of a file is too long")
    return bytes(data[i] for i in range(at, end)).decode("utf-8", "surrogateescape")


def _walk(data: Bytes, at: int, end: int, kind: str, depth: int) -> Iterator[str]:
    """Yield the locations in the message of this kind between two places."""
    if depth > _MOST_DEPTH:
        raise ValueError("it is nested too deeply")
    inner = _INNER.get(kind)
    for number, start, stop in fields(data, at, end):
        if stop < 0:
            continue
        if inner is None:
            if number == _TENSOR_EXTERNAL:
                entry = {n: (a, b) for n, a, b in fields(data, start, stop) if b >= 0}
                if _ENTRY_KEY in entry and _text(data, *entry[_ENTRY_KEY]) == "location":
                    yield _text(data, *entry.get(_ENTRY_VALUE, (0, 0)))
        elif number in inner:
            yield from _walk(data, start, stop, inner[number], depth + 1)
