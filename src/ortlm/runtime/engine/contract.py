"""What an artifact says of a graph, compared with the graph that ONNX Runtime has loaded.

Everything later relies on it: a state of another shape would be memory of another size, a logits output that is a
state would be words from its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ortlm.artifact import Graph, Manifest
from ortlm.dtypes import DType
from ortlm.errors import BadArtifact, nearest
from ortlm.runtime.engine.backend import TensorInfo
from ortlm.runtime.engine.states import FIXED_KINDS

_FLOATS = ("fp32", "fp16", "bf16")
# Element types and dimensions of what a decoder reads and writes; None: the loop says which types it feeds.
_ROLES: Mapping[str, tuple[tuple[str, ...] | None, tuple[int, ...]]] = {
    "input_ids": (None, (2,)),
    "attention_mask": (None, (2,)),
    # Three for each token, in multimodal models.
    "position_ids": (None, (2, 3)),
    "inputs_embeds": (_FLOATS, (3,)),
    "logits": (_FLOATS, (3,)),
    "hidden_states": (_FLOATS, (3,)),
}
_MOST_WIDTH = 1 << 20
_STATE_TYPES = (*_FLOATS, "int8", "uint8")


class _Loaded(Protocol):
    """A session: the tensors of the graph that it runs."""

    @property
    def inputs(self) -> Mapping[str, TensorInfo]: ...
    @property
    def outputs(self) -> Mapping[str, TensorInfo]: ...


def check_decoder(session: _Loaded, graph: Graph, manifest: Manifest) -> None:
    """Raise BadArtifact unless the tensors that ``graph`` names are in ``session``, of the right kind each.

    Which tensors are there at all, of those that have a role, is checked elsewhere.
    """
    for named, there in ((graph.inputs, session.inputs), (graph.outputs, session.outputs)):
        for role, name in named.items():
            if role in _ROLES and name in there:
                _check_role(graph, role, there[name])
    taken: dict[str, str] = {name: role for role, name in (*graph.inputs.items(), *graph.outputs.items())}
    for state in graph.states:
        for name, there in ((state.past, session.inputs), (state.present, session.outputs)):
            if name not in there:
                raise BadArtifact(
                    f"{graph.file} has no cache tensor {name!r}, which the artifact's configuration names."
                    + nearest(name, there)
                )
            if name in taken:
                raise BadArtifact(
                    f"{graph.file}: {name!r} is named as {taken[name]} and as a cache tensor, or twice as one."
                )
            taken[name] = "a cache tensor"
        past, present = session.inputs[state.past], session.outputs[state.present]
        if state.kind in FIXED_KINDS:
            _check_fixed(graph, past, present)
            continue
        rank = 5 if state.axis == 3 else 4
        if len(past.shape) != rank or past.dtype.name not in _STATE_TYPES:
            raise BadArtifact(f"{graph.file}: cache tensor {_said(past)} must have {rank} dimensions.")
        if present.dtype != past.dtype or len(present.shape) != rank:
            raise BadArtifact(f"{graph.file}: cache tensors {_said(past)} and {_said(present)} do not agree.")
        # Heads and width; the batch comes first, and positions vary.
        for at, said in ((rank - 3, state.heads), (rank - 1, state.head_dim)):
            sizes = {size for size in (past.shape[at], present.shape[at], said) if size is not None}
            if len(sizes) > 1 or not all(1 <= size <= _MOST_WIDTH for size in sizes):
                raise BadArtifact(
                    f"{graph.file}: the sizes of the cache tensors {_said(past)} and {_said(present)} do not "
                    f"agree with each other and with the configuration, {said} for dimension {at}."
                )
    _check_vocabulary(session, graph, manifest)


def _check_fixed(graph: Graph, past: TensorInfo, present: TensorInfo) -> None:
    """Raise BadArtifact unless a state of one size is such a one: all but the batch are the same numbers."""
    sizes = past.shape[1:]
    known = 2 <= len(sizes) <= 3 and all(size is not None and 1 <= size <= _MOST_WIDTH for size in sizes)
    if not known or past.dtype.name not in _FLOATS:
        raise BadArtifact(
            f"{graph.file}: cache tensor {_said(past)} must have two or three sizes after the batch."
        )
    agree = len(present.shape) == len(past.shape) and all(
        there in (None, size) for there, size in zip(present.shape[1:], sizes, strict=False)
    )
    if present.dtype != past.dtype or not agree:
        raise BadArtifact(f"{graph.file}: cache tensors {_said(past)} and {_said(present)} do not agree.")


def _check_vocabulary(session: _Loaded, graph: Graph, manifest: Manifest) -> None:
    info = session.outputs.get(graph.outputs.get("logits", ""))
    size = None if info is None else info.shape[2]
    if size is not None and size < manifest.vocab_size:
        raise BadArtifact(
            f"{graph.file} gives {size:,} logits, but the artifact's configuration says that the vocabulary has "
            f"{manifest.vocab_size:,} tokens. Build the model again."
        )
    vocabulary = size or manifest.vocab_size
    for token in manifest.stop_token_ids:
        if vocabulary and not 0 <= token < vocabulary:
            raise BadArtifact(
                f"the artifact's configuration ends answers at token {token}, but the vocabulary has "
                f"{vocabulary:,} tokens."
            )


def _check_role(graph: Graph, role: str, info: TensorInfo) -> None:
    types, ranks = _ROLES[role]
    if (types is not None and info.dtype.name not in types) or len(info.shape) not in ranks:
        kinds = f"{' or '.join(map(str, ranks))} dimensions" + (f" of {' or '.join(types)}" if types else "")
        raise BadArtifact(f"{graph.file}: {_said(info)} cannot be {role}, which has {kinds}.")


def _said(info: TensorInfo) -> str:
    def shown(size: int | None) -> str:
        return "?" if size is None else str(size)

    kind: DType = info.dtype
    return f"{info.name!r} ({kind.name} [{', '.join(map(shown, info.shape))}])"
