"""Graphs whose codes are widened when they are loaded, with that done beforehand.

Codes of widths that no kernel knows are stored as they are, and a few operators on them give 8 bits
(``graph/stored_codes.py``). ONNX Runtime computes those when it loads the graph, one after the other, each result
in memory of its own: that takes 1 s, and seven times the codes' size, for each 100 million of them. Here they are
computed matrix by matrix, on all threads, in memory that stays in the processor's caches, and put into the graph
in place of the operators.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ortlm._utils import protobuf
from ortlm.dtypes import BY_ONNX, Array, dtype

_log = logging.getLogger(__name__)

# Numbers of fields in onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TEXT = 1, 3, 4
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_VALUE_NAME = 1

# Graphs that hold their weights themselves are left as they are; ours never do.
_MOST_GRAPH_BYTES = 16 << 20
# A graph with its weights in it has to be less than 2 GB.
_MOST_WIDENED_BYTES = 1 << 30
# What every chain that widens codes has, and hardly another graph.
_MARK = b"BitShift"
_FP16, _FP32, _UINT8 = (dtype(name).onnx for name in ("fp16", "fp32", "uint8"))

_Message = tuple[int, int]


class _Unknown(ValueError):
    """Something that is left to ONNX Runtime."""


@dataclass(slots=True)
class _Node:
    kind: bytes
    domain: bytes
    inputs: list[bytes]
    outputs: list[bytes]
    attributes: list[_Message]
    message: _Message


@dataclass(slots=True)
class _Graph:
    """The parts of a graph that matter here, each with its place in ``data``."""

    data: bytes
    nodes: list[_Node] = field(default_factory=list)
    initializers: dict[bytes, _Message] = field(default_factory=dict)
    inputs: set[bytes] = field(default_factory=set)
    outputs: set[bytes] = field(default_factory=set)
    # What lies in the graph itself, such as places and shapes, is the same for many matrices.
    constants: dict[bytes, Array] = field(default_factory=dict)


def with_widened_codes(path: Path, *, threads: int) -> bytes | None:
    """Return the graph in ``path`` with what is computed from its stored codes alone put in as weights.

    Other weights stay in their files. None if there is nothing of this kind, or anything that is not known here:
    ONNX Runtime then computes it, or says what is wrong.
    """
    try:
        if path.stat().st_size > _MOST_GRAPH_BYTES:
            return None
        data = path.read_bytes()
        return _widened(data, path.parent, threads) if _MARK in data else None
    except (ValueError, LookupError, TypeError, OverflowError, OSError, MemoryError, RecursionError) as error:
        _log.info("ONNX Runtime widens the codes of %s: %s", path, error)
        return None


def _widened(data: bytes, folder: Path, threads: int) -> bytes | None:
    model = list(protobuf.fields(data, 0, len(data)))
    (place,) = [(start, stop) for number, start, stop in model if number == _MODEL_GRAPH]
    graph = _read(data, place)
    makers = _computed(graph)
    if not makers:
        return None
    made = set(makers)
    kept = [node for node in graph.nodes if not made.intersection(node.outputs)]
    used = {name for node in kept for name in _names(data, node)}
    wanted = [name for name in makers if name in used]
    evaluate = partial(_value, graph, makers, folder)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        arrays = list(pool.map(lambda name: np.ascontiguousarray(evaluate(name)), wanted))
    if sum(array.nbytes for array in arrays) > _MOST_WIDENED_BYTES:
        raise _Unknown("they are too many for one file")
    return _written(
        data, model, place, kept, used | graph.inputs | graph.outputs, dict(zip(wanted, arrays, strict=True))
    )


def _read(data: bytes, place: _Message) -> _Graph:
    graph = _Graph(data)
    for number, start, stop in protobuf.fields(data, *place):
        if number == _GRAPH_NODE:
            graph.nodes.append(_node(data, start, stop))
        elif number == _GRAPH_INITIALIZER:
            graph.initializers[_name(data, start, stop, _TENSOR_NAME)] = (start, stop)
        elif number == _GRAPH_INPUT:
            graph.inputs.add(_name(data, start, stop, _VALUE_NAME))
        elif number == _GRAPH_OUTPUT:
            graph.outputs.add(_name(data, start, stop, _VALUE_NAME))
    return graph


def _node(data: bytes, start: int, stop: int) -> _Node:
    node = _Node(b"", b"", [], [], [], (start, stop))
    for number, at, end in protobuf.fields(data, start, stop):
        if number == _NODE_INPUT:
            node.inputs.append(data[at:end])
        elif number == _NODE_OUTPUT:
            node.outputs.append(data[at:end])
        elif number == _NODE_KIND:
            node.kind = data[at:end]
        elif number == _NODE_ATTRIBUTE:
            node.attributes.append((at, end))
        elif number == _NODE_DOMAIN:
            node.domain = data[at:end]
    return node


def _name(data: bytes, start: int, stop: int, wanted: int) -> bytes:
    return next(
        (data[at:end] for number, at, end in protobuf.fields(data, start, stop) if number == wanted), b""
    )


def _names(data: bytes, node: _Node) -> Iterator[bytes]:
    """Yield what ``node`` reads, in the graphs that it holds too."""
    yield from node.inputs
    for attribute in node.attributes:
        for number, at, end in protobuf.fields(data, *attribute):
            if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS) and end >= 0:
                inner = _read(data, (at, end))
                yield from inner.outputs
                for other in inner.nodes:
                    yield from _names(data, other)


def _computed(graph: _Graph) -> dict[bytes, _Node]:
    """Return values that operators known here compute from weights in files and constants, with their nodes."""
    makers: dict[bytes, _Node] = {}
    stored: set[bytes] = set()  # what lies in files, or is computed from it
    for name, (start, stop) in graph.initializers.items():
        if name not in graph.inputs and any(
            number == _TENSOR_EXTERNAL for number, _, _ in protobuf.fields(graph.data, start, stop)
        ):
            stored.add(name)
    constants = graph.initializers.keys() - graph.inputs
    for node in graph.nodes:
        if (
            node.kind in _OPERATORS
            and not node.domain
            and len(node.outputs) == 1
            and node.outputs[0] not in graph.outputs
            and all(name in constants or name in makers for name in node.inputs)
            and any(name in stored for name in node.inputs)
        ):
            makers[node.outputs[0]] = node
            stored.add(node.outputs[0])
    return makers


def _value(
    graph: _Graph,
    makers: dict[bytes, _Node],
    folder: Path,
    name: bytes,
    known: dict[bytes, Array] | None = None,
) -> Array:
    """Return the value ``name``; ``known`` are others that were computed on the way."""
    known = {} if known is None else known
    if name not in known:
        node = makers.get(name)
        if node is None:
            known[name] = _initializer(graph, name, folder)
        else:
            inputs = [_value(graph, makers, folder, other, known) for other in node.inputs]
            known[name] = _OPERATORS[node.kind](inputs, _attributes(graph.data, node))
        if known[name].nbytes > _MOST_WIDENED_BYTES:
            raise _Unknown("one of them is too large")
    return known[name]


def _initializer(graph: _Graph, name: bytes, folder: Path) -> Array:
    """Return a weight, from its file or from the graph."""
    if name in graph.constants:
        return graph.constants[name]
    data = graph.data
    shape: list[int] = []
    kind, raw, entries = 0, None, {}
    for number, at, end in protobuf.fields(data, *graph.initializers[name]):
        if number == _TENSOR_DIMS:
            shape += [at] if end < 0 else protobuf.packed_varints(data, at, end)
        elif number == _TENSOR_TYPE:
            kind = at
        elif number == _TENSOR_RAW:
            raw = data[at:end]
        elif number == _TENSOR_EXTERNAL:
            entry = {n: data[a:b].decode() for n, a, b in protobuf.fields(data, at, end)}
            entries[entry[1]] = entry.get(2, "")
    numpy = np.dtype(BY_ONNX[kind].numpy)
    count = math.prod(shape)
    if entries:
        if int(entries.get("length", count * numpy.itemsize)) != count * numpy.itemsize:
            raise _Unknown("the length of a weight is not that of its shape")
        file, offset = folder / entries["location"], int(entries.get("offset", 0))
        found = np.fromfile(file, numpy, count, offset=offset)
    elif raw is not None:
        found = graph.constants[name] = np.frombuffer(raw, numpy).reshape(shape)
    else:
        raise _Unknown("a constant is not in its raw form")
    return found.reshape(shape)


def _attributes(data: bytes, node: _Node) -> dict[bytes, int | bytes]:
    """Return the attributes of ``node`` that are a number or a text."""
    found: dict[bytes, int | bytes] = {}
    for attribute in node.attributes:
        name = b""
        value: int | bytes | None = None
        for number, at, end in protobuf.fields(data, *attribute):
            if number == _ATTRIBUTE_NAME:
                name = data[at:end]
            elif number == _ATTRIBUTE_INTEGER:
                value = at
            elif number == _ATTRIBUTE_TEXT:
                value = data[at:end]
        if value is not None:
            found[name] = value
    return found


# --- operators: each takes the values of its inputs and its attributes ---------------------------------------

_Attributes = dict[bytes, int | bytes]


def _slice(inputs: Sequence[Array], attributes: _Attributes) -> Array:
    x, starts, ends, axes = inputs
    places = [slice(None)] * x.ndim
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        if not (0 <= start <= end <= x.shape[axis] and 0 <= axis < x.ndim):
            raise _Unknown("a part that is cut out is given in an unusual way")
        places[axis] = slice(start, end)
    return np.asarray(x[tuple(places)])


def _shift(inputs: Sequence[Array], attributes: _Attributes) -> Array:
    x, by = _bytes(inputs)
    if by.ndim or by > 7:
        raise _Unknown("a shift is not by one number below 8")
    direction = attributes[b"direction"]
    if direction not in (b"LEFT", b"RIGHT"):
        raise _Unknown("a shift goes neither left nor right")
    return np.asarray(x << by if direction == b"LEFT" else x >> by)


def _and(inputs: Sequence[Array], attributes: _Attributes) -> Array:
    x, mask = _bytes(inputs)
    return np.asarray(x & mask)


def _or(inputs: Sequence[Array], attributes: _Attributes) -> Array:
    x, y = _bytes(inputs)
    return np.asarray(x | y)


def _concat(inputs: Sequence[Array], attributes: _Attributes) -> Array:
    axis = attributes[b"axis"]
    if not isinstance(axis, int) or len({x.dtype for x in inputs}) != 1:
        raise _Unknown("parts are put together in an unusual way")
    return np.concatenate(inputs, axis=axis)


def _reshape(inputs: Sequence[Array], attributes: _Attributes) -> Array:
    x, shape = inputs
    if shape.ndim != 1 or (shape <= 0).any():
        raise _Unknown("a shape is not given in full")
    return x.reshape(shape.tolist())


def _cast(inputs: Sequence[Array], attributes: _Attributes) -> Array:
    (x,) = inputs
    if x.dtype != np.float16 or attributes[b"to"] != _FP32:
        raise _Unknown("an element type is changed that is not known here")
    return x.astype(np.float32)


_OPERATORS: dict[bytes, Callable[[Sequence[Array], _Attributes], Array]] = {
    b"BitShift": _shift,
    b"BitwiseAnd": _and,
    b"BitwiseOr": _or,
    b"Cast": _cast,
    b"Concat": _concat,
    b"Reshape": _reshape,
    b"Slice": _slice,
}


def _bytes(inputs: Sequence[Array]) -> tuple[Array, Array]:
    """Return two inputs of bytes whose shapes are alike, or one of which is a single number."""
    x, y = inputs
    if x.dtype != np.uint8 or y.dtype != np.uint8 or not (y.ndim == 0 or x.shape == y.shape):
        raise _Unknown("bits are combined in an unusual way")
    return x, y


# --- the graph that comes of it --------------------------------------------------------------------------------


def _written(
    data: bytes,
    model: Iterable[tuple[int, int, int]],
    place: _Message,
    nodes: Iterable[_Node],
    used: Collection[bytes],
    arrays: dict[bytes, Array],
) -> bytes:
    """Return the model with ``nodes`` only, and ``arrays`` by name among its weights, without unused ones."""
    parts: list[Any] = []
    for number, start, stop in protobuf.fields(data, *place):
        if number == _GRAPH_NODE:
            continue
        if number == _GRAPH_INITIALIZER and _name(data, start, stop, _TENSOR_NAME) not in used:
            continue
        parts.append(_copied(data, number, start, stop))
    parts += [_copied(data, _GRAPH_NODE, *node.message) for node in nodes]
    for name, array in arrays.items():
        head = b"".join(protobuf.field(_TENSOR_DIMS, size) for size in array.shape)
        head += protobuf.field(_TENSOR_TYPE, _UINT8 if array.dtype == np.uint8 else _FP32)
        head += protobuf.field(_TENSOR_NAME, name) + protobuf.varint(_TENSOR_RAW << 3 | 2)
        head += protobuf.varint(array.nbytes)
        parts += [
            protobuf.varint(_GRAPH_INITIALIZER << 3 | 2) + protobuf.varint(len(head) + array.nbytes) + head,
            array.data.cast("B"),
        ]
    graph = sum(map(len, parts))
    whole: list[Any] = []
    for number, start, stop in model:
        if (start, stop) == place:
            whole += [protobuf.varint(_MODEL_GRAPH << 3 | 2) + protobuf.varint(graph), *parts]
        else:
            whole.append(_copied(data, number, start, stop))
    return b"".join(whole)


def _copied(data: bytes, number: int, start: int, stop: int) -> bytes:
    return protobuf.field(number, data[start:stop] if stop >= 0 else start)
