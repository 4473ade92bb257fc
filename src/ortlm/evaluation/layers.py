"""How much each layer's input differs from the reference's: a signal-to-noise ratio per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ortlm.artifact import Artifact, graph_named
from ortlm.dtypes import Array, Floats
from ortlm.errors import BadArtifact, BadOption
from ortlm.layerwise.types import Observe
from ortlm.runtime.engine.backend import Binding, DeviceTensor, Memory, TensorInfo
from ortlm.runtime.engine.decode_loop import CHUNK_TOKENS, Loop
from ortlm.runtime.engine.devices import CPU, Device
from ortlm.runtime.engine.session import OrtBinding, Session
from ortlm.runtime.loading import open_embedder

# Other builders call the nodes alike.
# Integer matmuls begin with a Reshape.
_ATTENTION = re.compile(r"/model/layers\.(\d+)/attn/(?:qkv_proj|q_proj)/(?:MatMul|integer/Reshape)")
_HEAD = re.compile(r"/lm_head/(?:MatMul|Gemm)")
OBSERVED_CHUNKS = 2


class LayerNoise:
    """Collects what goes through a reference and then through a model, and compares them layer by layer."""

    def __init__(self) -> None:
        self._reference: dict[tuple[int, int], Floats] = {}
        self._signal: dict[int, float] = {}
        self._noise: dict[int, float] = {}

    def reference(self, layer: int, chunk: int, states: Floats) -> None:
        """Keep the reference's ``states`` [S, H] if they are of the first chunks."""
        if chunk < OBSERVED_CHUNKS:
            self._reference[layer, chunk] = np.array(states, np.float32)

    def model(self, layer: int, chunk: int, states: Floats) -> None:
        """Compare the model's ``states`` [S, H] with the reference's, which are forgotten then."""
        wanted = self._reference.pop((layer, chunk), None)
        if wanted is None or wanted.shape != states.shape:
            other = "none" if wanted is None else f"states of shape {wanted.shape}"
            raise BadOption(
                f"the artifact has states of shape {states.shape} in layer {layer}, and the reference {other}: "
                "these are different models. Leave --layers out, or give the one that it was built from."
            )
        exact = wanted.astype(np.float64)
        self._signal[layer] = self._signal.get(layer, 0.0) + float((exact**2).sum())
        self._noise[layer] = self._noise.get(layer, 0.0) + float(((exact - states) ** 2).sum())

    def decibels(self) -> list[float | None]:
        """Return 10 log10(Σ ref² / Σ (ref - q)²) for each layer, and the head; None where both are the same."""
        return [
            10 * float(np.log10(self._signal[layer] / self._noise[layer])) if self._noise[layer] else None
            for layer in sorted(self._signal)
        ]


def observe_artifact(
    artifact: Artifact,
    chunks: Sequence[Sequence[int]],
    observe: Observe,
    *,
    threads: int | None = None,
    device: Device = CPU,
) -> None:
    """Run ``artifact`` on ``chunks`` and hand the inputs of each layer's attention and of the head to ``observe``.

    Raises BadArtifact if the graph's nodes have other names than ortlm and the official builder give them.
    """
    manifest, graph = artifact.manifest, graph_named(artifact.manifest, "decoder")
    path = artifact.graph_path("decoder")
    model, names = tapped_graph(path)
    session = Session(path, threads=threads, device=device, options=manifest.session_options, model=model)
    tapped = _Tapped(session, names)
    loop = Loop(
        tapped,
        graph,
        context_tokens=manifest.context_tokens,
        switch_tokens=manifest.rope_switch_tokens,
        chunk_tokens=(manifest.prompt_tokens or CHUNK_TOKENS + 1) - 1,
        embedder=open_embedder(artifact, threads=threads, device=device),
    )
    for number, ids in enumerate(chunks):
        loop.start()
        tapped.kept = [[] for _ in names]
        loop.append([list(ids)], keep=len(ids))
        for layer, parts in enumerate(tapped.kept):
            observe(layer, number, np.concatenate(parts, axis=1)[0])


def tapped_graph(source: Path) -> tuple[bytes, list[str]]:
    """Return the graph ``source`` with further outputs, and their names, layer by layer.

    The weights are not copied: it names the same files.
    """
    model = ir.load(source)
    layers: dict[int, ir.Value] = {}
    head: ir.Value | None = None
    for node in model.graph:
        name = node.name or ""
        at = _ATTENTION.match(name)
        if at is not None and node.inputs[0] is not None:
            layers.setdefault(int(at[1]), node.inputs[0])
        elif head is None and _HEAD.match(name):
            head = node.inputs[0]
    if not layers or sorted(layers) != list(range(len(layers))) or head is None:
        raise BadArtifact(
            f"{source} has no nodes named /model/layers.0/attn/qkv_proj/MatMul and so on, nor "
            "/lm_head/MatMul, by which its layers would be found. Evaluate without --layers."
        )
    taps = [*(layers[i] for i in sorted(layers)), _unscaled(head)]
    names = [f"tap.{i}" for i in range(len(taps))]
    for name, value in zip(names, taps, strict=True):
        # Some of the types that models compute in are none of numpy's.
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"/{name}/Cast")
        cast.outputs[0].name = name
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        cast.outputs[0].shape = ir.Shape([None, None, None])
        model.graph.append(cast)
        model.graph.outputs.append(cast.outputs[0])
    return ir.to_proto(model).SerializeToString(), names


def _unscaled(value: ir.Value) -> ir.Value:
    """Return the final norm's output that ``value`` was made of, to be multiplied by the head."""
    node = value.producer()
    while node is not None and (node.name or "").startswith(("/lm_head/Mul", "/lm_head/Reshape")):
        first = node.inputs[0]
        if first is None:
            break
        value, node = first, first.producer()
    return value


class _Tapped:
    """A session whose every run also keeps the outputs ``names``, in ``kept``."""

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        self._session, self._names = session, names
        self.kept: list[list[Floats]] = [[] for _ in names]

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        return self._session.inputs

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        return self._session.outputs

    def tensor(self, array: Array) -> DeviceTensor:
        return self._session.tensor(array)

    @property
    def memory(self) -> Memory:
        return self._session.memory

    @property
    def captures(self) -> bool:
        return self._session.captures

    def binding(self) -> OrtBinding:
        return self._session.binding()

    def release(self, capture: int) -> None:
        self._session.release(capture)

    def run(self, binding: Binding, *, brief: bool = False, capture: int | None = None) -> None:
        for name in self._names:
            # New memory for every run: pieces of a text differ in length.
            binding.output(name, None, to_host=True)
        self._session.run(binding, brief=brief, capture=capture)
        for name, kept in zip(self._names, self.kept, strict=True):
            # The next run may write to the same memory.
            kept.append(np.array(binding.result(name).numpy(), np.float32))
