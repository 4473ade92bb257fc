"""An artifact whose graph is run piece by piece, so that memory holds the weights of one piece at a time."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ortlm.artifact import Artifact, graph_named
from ortlm.dtypes import Array, Floats
from ortlm.errors import BadOption
from ortlm.evaluation.types import Tokens
from ortlm.layerwise.types import Observe
from ortlm.runtime.engine.backend import TensorInfo
from ortlm.runtime.engine.huge_pages import give_back_freed_memory
from ortlm.runtime.engine.session import Session

# A part has weights of so many bytes, or one node with more.
_PART_BYTES = 192 << 20
# Weights are brought into the kernels' layout one after the other, which takes longer, and less memory.
_OPTIONS = {"session.prepack.enable_parallel": "0", "enable_cpu_mem_arena": False}
_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})
_OPTIONAL = frozenset({"logits_to_keep", "columns_to_keep"})


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive nodes of a graph as a graph of their own, serialized: what it reads, and what is read of it."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class PartsSource:
    """An artifact as a Source that loads the parts of its graph one after the other, once for all chunks.

    The chunks have one length, below ``rope_switch_tokens``. Logits of all are in memory. Raises BadOption for
    artifacts whose inputs are other than ids, mask, positions and states: those of vision models, for example.
    """

    def __init__(
        self, artifact: Artifact, threads: int | None = None, *, part_bytes: int = _PART_BYTES
    ) -> None:
        graph = graph_named(artifact.manifest, "decoder")
        unknown = (graph.inputs.keys() - _INPUTS) | (graph.optional.keys() - _OPTIONAL)
        if unknown or len(artifact.manifest.graphs) > 1 or artifact.manifest.prompt_tokens is not None:
            raise BadOption(
                f"{artifact.path} has several graphs, inputs that are not of text, or other weights for prompts."
            )
        self._graph, self._path = graph, artifact.graph_path("decoder")
        self._options = {**artifact.manifest.session_options, **_OPTIONS}
        self._threads, self._part_bytes = threads, part_bytes
        self.vocab_size = artifact.manifest.vocab_size
        self._logits: Floats = np.empty((0, 0, 0), np.float32)

    def open(self, chunks: Sequence[Tokens], observe: Observe | None = None) -> None:
        """Run all parts on the chunks."""
        if observe is not None:
            raise NotImplementedError("nothing is seen of what goes through a part.")
        ids = np.stack(chunks)
        values: dict[str, Array] = {}
        logits = self._graph.outputs["logits"]
        parts = parts_of(self._path, self._fed_names(), [logits], self._part_bytes)
        for number, part in enumerate(parts):
            values.update(self._run(part, values, ids))
            wanted = {logits}.union(*(later.inputs for later in parts[number + 1 :]))
            values = {name: value for name, value in values.items() if name in wanted}
            # Sessions hold themselves.
            gc.collect()
            give_back_freed_memory()
        self._logits = values[logits].astype(np.float32, copy=False)

    def logits(self, chunk: int) -> Floats:
        """Return the logits after every token of a chunk, [S, V]."""
        logits: Floats = self._logits[chunk]
        return logits

    def _run(self, part: Part, values: Mapping[str, Array], ids: Tokens) -> dict[str, Array]:
        session = Session(self._path, threads=self._threads, options=self._options, model=part.model)
        binding = session.binding()
        given = {
            name: values[name] if name in values else self._fed(info, ids)
            for name, info in session.inputs.items()
        }
        for name, value in given.items():
            binding.input(name, session.tensor(np.ascontiguousarray(value)))
        for name in part.outputs:
            binding.output(name, None, to_host=True)
        session.run(binding)
        return {name: np.array(binding.result(name).numpy()) for name in part.outputs}

    def _fed_names(self) -> set[str]:
        graph = self._graph
        return {*graph.inputs.values(), *graph.optional.values(), *(state.past for state in graph.states)}

    def _fed(self, info: TensorInfo, ids: Tokens) -> Array:
        """Return what a text without a past puts into an input of the graph."""
        graph, kind = self._graph, info.dtype.numpy
        roles = {name: role for role, name in (*graph.inputs.items(), *graph.optional.items())}
        if info.name in roles:
            found: dict[str, Array] = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
            }
            # 0 keeps all.
            return found.get(roles[info.name], np.zeros((), np.int64)).astype(kind)
        # The first of what varies is the number of rows, the other the length.
        sizes = iter((len(ids), 0))
        return np.zeros([next(sizes) if size is None else size for size in info.shape], kind)


def parts_of(path: Path, fed: Collection[str], outputs: Sequence[str], most: int) -> list[Part]:
    """Cut the graph ``path`` into parts that follow each other and together compute ``outputs`` from ``fed``.

    A part has weights of at most ``most`` bytes, or a single node. What is made of weights alone is computed in
    every part that needs it. Weights are not copied: the parts name the same files, next to the graph.
    """
    return _Cut(ir.to_proto(ir.load(path)), fed, outputs).parts(most)


class _Cut:
    def __init__(self, model: onnx.ModelProto, fed: Collection[str], outputs: Sequence[str]) -> None:
        graph = model.graph
        self._model, self._wanted = model, set(outputs)
        # Of what is fed, an initializer is only the default.
        self._weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
        self._types = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._constant = set(self._weights)
        self._nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if all(name in self._constant for name in _read(node)):
                self._makers.update((name, node) for name in node.output if name)
                self._constant.update(node.output)
            else:
                self._nodes.append(node)

    def parts(self, most: int) -> list[Part]:
        """Return the parts."""
        groups: list[list[onnx.NodeProto]] = [[]]
        room = most
        for node in self._nodes:
            size = sum(_bytes(self._weights[name]) for name in self._made_of(node)[1])
            if size > room and groups[-1]:
                groups.append([])
                room = most
            groups[-1].append(node)
            room -= size
        return [self._part(nodes, self._later(groups[at + 1 :])) for at, nodes in enumerate(groups)]

    def _later(self, groups: Sequence[Sequence[onnx.NodeProto]]) -> set[str]:
        return self._wanted.union(name for nodes in groups for node in nodes for name in _read(node))

    def _made_of(self, *nodes: onnx.NodeProto) -> tuple[list[onnx.NodeProto], list[str]]:
        """Return the nodes that compute constants for ``nodes``, in order, and the weights that all read."""
        made: dict[int, onnx.NodeProto] = {}
        weights: dict[str, None] = {}

        def visit(node: onnx.NodeProto) -> None:
            for name in _read(node):
                if name in self._weights:
                    weights[name] = None
                elif name in self._makers and id(self._makers[name]) not in made:
                    visit(self._makers[name])
                    made[id(self._makers[name])] = self._makers[name]

        for node in nodes:
            visit(node)
        return list(made.values()), list(weights)

    def _part(self, nodes: Sequence[onnx.NodeProto], later: set[str]) -> Part:
        constants, weights = self._made_of(*nodes)
        every = [*constants, *nodes]
        own = {name for node in every for name in node.output if name}
        inputs = tuple(
            dict.fromkeys(
                name
                for node in nodes
                for name in _read(node)
                if name not in own and name not in self._weights
            )
        )
        outputs = tuple(name for node in nodes for name in node.output if name and name in later)
        part = onnx.ModelProto()
        part.CopyFrom(self._model)
        part.graph.Clear()
        part.graph.name = self._model.graph.name
        part.graph.node.extend(every)
        part.graph.initializer.extend(self._weights[name] for name in weights)
        part.graph.input.extend(self._types[name] for name in inputs)
        part.graph.output.extend(self._types[name] for name in outputs)
        return Part(part.SerializeToString(), inputs, outputs)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, those that its branches take from outside among them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for branch in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {tensor.name for tensor in branch.initializer} | {info.name for info in branch.input}
            for inner in branch.node:
                yield from (name for name in _read(inner) if name not in own)
                own.update(inner.output)
            yield from (info.name for info in branch.output if info.name not in own)


def _bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    size: int = tensor.ByteSize()
    return size
