"""Constant folding, before ONNX Runtime loads a graph.

Two things are computed from constants and weights alone: tables of cosines and sines for rotary embedding, and
codes of widths that no kernel knows, which are stored as they are and widened to 8 bits
(``graph/stored_codes.py``). ONNX Runtime computes them when it loads the graph, on one thread, one operator after
the other, each result in memory of its own: 0.2 s for the tables of 128K tokens, and for each 100 million codes
1 s, and seven times their size. Here they are computed value by value, on all threads, in memory that stays in the
processor's caches, and the graph has the results in place of the operators.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ortlm._utils import protobuf
from ortlm.dtypes import BY_ONNX, Array, dtype
from ortlm.runtime.engine.folding_operators import OPERATORS, Unknown
from ortlm.runtime.engine.scratch_file import ScratchFile
from ortlm.runtime.engine.small_graphs import SmallGraph

_log = logging.getLogger(__name__)

# Numbers of fields in onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TEXT = 1, 3, 4
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_TENSOR_LOCATION, _EXTERNAL = 14, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_NAME = 1
# No file is so long: if anybody looked there for what is given with the graph, that would be an error.
_BEYOND = 1 << 50

# Graphs that hold their weights themselves are left as they are; ours never do.
_MOST_GRAPH_BYTES = 16 << 20
# A graph with its weights in it has to be less than 2 GB.
_MOST_WIDENED_BYTES = 1 << 30
# What every chain that widens codes has, and hardly another graph has.
_CODES_MARK = b"BitShift"
# What chains that make tables have.
_TABLE_MARK = b"Cos"
# No optimizer of ONNX Runtime looks at what these read, so it need not be in the graph. Small values are anyway.
_READ_IN_PLACE = frozenset(
    (b"GatherBlockQuantized", b"GroupQueryAttention", b"MatMulNBits", b"QMoE", b"RotaryEmbedding")
)
_LEAST_GIVEN_BYTES, _LEAST_KEPT_BYTES = 1 << 12, 1 << 16
# As ONNX Runtime would: other libraries differ in the last bit, and an answer may turn on that.
_BY_ONNXRUNTIME = frozenset((b"Cos", b"Sin"))
_FP32 = dtype("fp32").onnx
_ONNX = {kind.numpy: number for number, kind in BY_ONNX.items()}

_Message = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Folded:
    """A graph with its constants computed.

    ``graph`` holds what is small, and only names what is ``given``: to ONNX Runtime, with the graph
    (``SessionOptions.add_initializer``), which reads it where it is as long as there is a session. Tables are read
    at every run, codes only until ONNX Runtime has brought them into its kernels' layout; the latter lie in
    ``scratch``, which may ``rest`` then.
    """

    graph: bytes
    given: Mapping[str, Array]
    scratch: ScratchFile


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


def folded(path: Path, *, threads: int, run: Callable[[bytes, Array], Array]) -> Folded | None:
    """Return the graph in ``path`` with what is computed from its weights and constants alone in it as weights.

    ``run`` runs a graph from x to y on an array, on one thread.
    Other weights stay in their files. None if there is nothing of this kind, or anything that is not known here:
    ONNX Runtime then computes it, or says what is wrong.
    """
    try:
        if path.stat().st_size > _MOST_GRAPH_BYTES:
            return None
        data = path.read_bytes()
        return _folded(data, path, threads, run) if _CODES_MARK in data or _TABLE_MARK in data else None
    except (ValueError, LookupError, TypeError, OverflowError, OSError, MemoryError, RecursionError) as error:
        _log.info("ONNX Runtime folds the constants of %s: %s", path, error)
        return None


def _folded(data: bytes, path: Path, threads: int, run: Callable[[bytes, Array], Array]) -> Folded | None:
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
    values = _Values(graph, makers, path.parent, run)
    # What other nodes read has to be in the graph.
    inside = {name for node in kept if node.kind not in _READ_IN_PLACE for name in _names(data, node)}
    scratch = ScratchFile()

    def made_of(name: bytes) -> Array | _Kept:
        array = values.of(name)
        if array.dtype == np.uint8 and array.nbytes >= _LEAST_KEPT_BYTES and name not in inside:
            kept_at = scratch.keep(array)
            if kept_at is not None:
                return _Kept(kept_at, array.shape)
        return array

    try:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            results = dict(zip(wanted, pool.map(made_of, wanted), strict=True))
    except Exception:
        scratch.rest()
        raise
    arrays, given = {}, {}
    for name, result in results.items():
        if isinstance(result, _Kept):
            arrays[name] = given[name] = scratch.read(result.place, result.shape, np.dtype(np.uint8))
            continue
        arrays[name] = result
        if result.dtype.kind == "f" and result.nbytes >= _LEAST_GIVEN_BYTES and name not in inside:
            given[name] = result
    if sum(array.nbytes for name, array in arrays.items() if name not in given) > _MOST_WIDENED_BYTES:
        raise Unknown("they are too many for one file")
    named = used | graph.inputs | graph.outputs
    written = _written(data, model, place, kept, named, arrays, given, path.name.encode())
    return Folded(written, {name.decode(): array for name, array in given.items()}, scratch)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Codes in the scratch file."""

    place: int
    shape: tuple[int, ...]


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
    """Return values that operators known here compute from weights and constants alone, with their nodes."""
    makers: dict[bytes, _Node] = {}
    constants = graph.initializers.keys() - graph.inputs
    for node in graph.nodes:
        if (
            (node.kind in OPERATORS or node.kind in _BY_ONNXRUNTIME)
            and not node.domain
            and len(node.outputs) == 1
            and node.outputs[0] not in graph.outputs
            and all(name in constants or name in makers for name in node.inputs)
            # ONNX Runtime casts scales as fast, from where their file is mapped.
            and (node.kind != b"Cast" or node.inputs[0] in makers)
        ):
            makers[node.outputs[0]] = node
    return makers


# --- values ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Initializer:
    """A weight or a constant: ``raw`` if it lies in the graph, else in ``file`` from ``offset`` on."""

    shape: list[int]
    dtype: np.dtype[Any]
    raw: bytes | None = None
    file: Path | None = None
    offset: int = 0

    def read(self) -> Array:
        """Return its value."""
        if self.file is None:
            assert self.raw is not None
            return np.frombuffer(self.raw, self.dtype).reshape(self.shape)
        return np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset).reshape(
            self.shape
        )


class _Values:
    """Computes values of ``graph``, whose weights are in ``folder``. May be used by several threads."""

    def __init__(
        self,
        graph: _Graph,
        makers: Mapping[bytes, _Node],
        folder: Path,
        run: Callable[[bytes, Array], Array],
    ) -> None:
        self._graph, self._makers, self._folder, self._run = graph, makers, folder, run
        self._uses = Counter(name for node in makers.values() for name in node.inputs)
        # What lies in the graph itself, such as places and shapes, is the same for many matrices.
        self._known: dict[bytes, _Initializer] = {}

    def of(self, name: bytes) -> Array:
        """Return the value ``name``, contiguous."""
        return np.ascontiguousarray(self._value(name, {}))

    def _value(self, name: bytes, known: dict[bytes, Array]) -> Array:
        """Return the value ``name``; ``known`` are others that are needed again."""
        if name in known:
            return known[name]
        node = self._makers.get(name)
        if node is None:
            weight = self._initializer(name)
            found = weight.read()
            # Read once for all that is cut out of it.
            if weight.file is not None:
                known[name] = found
            return found
        inputs = [self._value(other, known) for other in node.inputs]
        spare = [
            self._uses[other] == 1 and other in self._makers and x.flags.owndata
            for other, x in zip(node.inputs, inputs, strict=True)
        ]
        if node.kind in _BY_ONNXRUNTIME:
            (x,) = inputs
            if x.dtype != np.float32:
                raise Unknown("an element type is not known here")
            found = self._run(_alone(node.kind), x)
        else:
            found = OPERATORS[node.kind](inputs, _attributes(self._graph.data, node), spare)
        if found.nbytes > _MOST_WIDENED_BYTES:
            raise Unknown("one of them is too large")
        if self._uses[name] > 1:
            known[name] = found
        return found

    def _initializer(self, name: bytes) -> _Initializer:
        if name not in self._known:
            self._known[name] = self._described(name)
        return self._known[name]

    def _described(self, name: bytes) -> _Initializer:
        data = self._graph.data
        shape: list[int] = []
        kind, raw, entries = 0, None, {}
        for number, at, end in protobuf.fields(data, *self._graph.initializers[name]):
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
        if entries:
            size = math.prod(shape) * numpy.itemsize
            if int(entries.get("length", size)) != size:
                raise Unknown("the length of a weight is not that of its shape")
            file, offset = self._folder / entries["location"], int(entries.get("offset", 0))
            return _Initializer(shape, numpy, file=file, offset=offset)
        if raw is None:
            raise Unknown("a constant is not in its raw form")
        return _Initializer(shape, numpy, raw=raw)


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


# --- the graph that comes of it --------------------------------------------------------------------------------


def _alone(kind: bytes) -> bytes:
    """Return a graph with one operator of this kind, from x to y, both fp32."""
    name = kind.decode()
    graph = SmallGraph(name, 17)
    graph.op(name, graph.input("x", _FP32), name="y")
    graph.output("y", _FP32)
    return graph.model()


def _written(
    data: bytes,
    model: Iterable[tuple[int, int, int]],
    place: _Message,
    nodes: Iterable[_Node],
    used: Collection[bytes],
    arrays: dict[bytes, Array],
    given: Collection[bytes],
    elsewhere: bytes,
) -> bytes:
    """Return the model with ``nodes`` only, and ``arrays`` by name among its weights, without unused ones.

    Those of ``given`` are said to be in the file ``elsewhere``, after its end.
    """
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
        head += protobuf.field(_TENSOR_TYPE, _ONNX[array.dtype]) + protobuf.field(_TENSOR_NAME, name)
        if name in given:
            for key, value in (
                (b"location", elsewhere),
                (b"offset", b"%d" % _BEYOND),
                (b"length", b"%d" % array.nbytes),
            ):
                entry = protobuf.field(_ENTRY_KEY, key) + protobuf.field(_ENTRY_VALUE, value)
                head += protobuf.field(_TENSOR_EXTERNAL, entry)
            head += protobuf.field(_TENSOR_LOCATION, _EXTERNAL)
            parts.append(protobuf.field(_GRAPH_INITIALIZER, head))
            continue
        head += protobuf.varint(_TENSOR_RAW << 3 | 2) + protobuf.varint(array.nbytes)
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
