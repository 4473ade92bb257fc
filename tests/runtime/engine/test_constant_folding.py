"""Constants folded before ONNX Runtime loads a graph: the same logits, fewer operators, and nothing guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.dtypes import BY_ONNX
from ortlm.errors import BadArtifact
from ortlm.runtime.engine import constant_folding
from ortlm.runtime.engine import session as sessions
from ortlm.runtime.engine.constant_folding import folded
from ortlm.runtime.engine.session import run_once

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def built(saved: Any, out: Path, name: str = "llama", **options: Any) -> Path:
    """Return the graph of a new folder, whose codes have 5 bits unless ``options`` say something else."""
    chosen = BuildOptions(**{"bits": 5, "block_size": 32, "recipe": "fast", **options})
    ortlm.build(saved(name).folder, out, precision="int4", options=chosen)
    return out / "model.onnx"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 6},
        {"bits": 3},
        {"bits": 3, "symmetric": True, "embed_bits": 3},
        {"symmetric": True},
        {"embed_bits": 5, "head_bits": 6},
        {"fast_prompts": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_the_same_logits(
    name: str, options: dict[str, Any], saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(saved, tmp_path / "out", name, **options)
    model = whole(path)
    assert not {"BitShift", "BitwiseAnd", "BitwiseOr", "Cos", "Sin"} & {
        node.op_type for node in model.graph.node
    }
    path.with_name("folded.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(path.with_name("folded.onnx"), full_check=True)
    here = ortlm.load(tmp_path / "out").logits(IDS)
    monkeypatch.setattr(sessions, "folded", lambda *_, **__: None)
    assert np.array_equal(here, ortlm.load(tmp_path / "out").logits(IDS))


@pytest.mark.parametrize("room", [True, False])
def test_codes_in_a_scratch_file(
    room: bool, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(saved, tmp_path / "out", embed_bits=6)
    before = ortlm.load(tmp_path / "out").logits(IDS)
    monkeypatch.setattr(constant_folding, "_LEAST_KEPT_BYTES", 1)
    if not room:
        monkeypatch.setattr(
            "ortlm.runtime.engine.scratch_file._opened", lambda: (tmp_path / "no" / "f").open()
        )
    found = folded(path, threads=2, run=run_once)
    assert found is not None
    assert any(array.dtype == np.uint8 for array in found.given.values()) == room
    lm = ortlm.load(tmp_path / "out")
    del found
    assert np.array_equal(lm.logits(IDS), before)
    assert np.array_equal(lm.logits(IDS), before)


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "gemma3"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tables_of_cosines_and_sines(precision: str, name: str, saved: Any, tmp_path: Path) -> None:
    ortlm.build(
        saved(name).folder,
        tmp_path / "out",
        precision=precision,
        target={"fp32": "cpu", "fp16": "cuda"}[precision],
    )
    path = tmp_path / "out" / "model.onnx"
    model = whole(path)
    assert not {"Cos", "Sin"} & {node.op_type for node in model.graph.node}
    weights = [tensor for tensor in model.graph.initializer if tensor.raw_data]
    made = {tensor.name: array_of(tensor) for tensor in weights}
    before = onnx.load(path, load_external_data=False)
    makers = {node.output[0]: node for node in before.graph.node}
    tables = sorted(makers.keys() & made.keys())
    assert len(tables) >= 2
    # What the tables are made of, and nothing else.
    needed, names = [], list(tables)
    while names:
        node = makers.get(names.pop())
        if node is not None and node not in needed:
            needed.insert(0, node)
            names += node.input
    inputs = {name for node in needed for name in node.input}
    alone = onnx.ModelProto(ir_version=before.ir_version, opset_import=before.opset_import)
    alone.graph.name = "tables"
    alone.graph.node.extend(needed)
    alone.graph.initializer.extend(tensor for tensor in before.graph.initializer if tensor.name in inputs)
    alone.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tables)
    session = onnxruntime.InferenceSession(alone.SerializeToString())
    for name_, expected in zip(tables, session.run(None, {}), strict=True):
        assert made[name_].shape == expected.shape
        assert made[name_].dtype == expected.dtype
        assert np.array_equal(made[name_], expected)


def test_graphs_without_such_constants_are_loaded_as_they_are(tmp_path: Path) -> None:
    node = onnx.NodeProto(name="Cosine", op_type="Add", input=["x", "y"], output=["z"])
    model = onnx.ModelProto(
        graph=onnx.GraphProto(node=[node], initializer=[constant("y", np.ones(1, np.uint8))])
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert folded(path, threads=1, run=run_once) is None


def array_of(tensor: onnx.TensorProto) -> Any:
    return np.frombuffer(tensor.raw_data, BY_ONNX[tensor.data_type].numpy).reshape(tensor.dims)


def whole(path: Path) -> onnx.ModelProto:
    """Return the graph in ``path`` after folding, with what is given to ONNX Runtime apart from it."""
    found = folded(path, threads=2, run=run_once)
    assert found is not None
    model = onnx.load_from_string(found.graph)
    for tensor in model.graph.initializer:
        if tensor.name in found.given:
            array = found.given[tensor.name]
            assert list(tensor.dims) == list(array.shape)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = array.tobytes()
    return model


def constant(name: str, array: Any) -> onnx.TensorProto:
    kind = onnx.TensorProto.INT64 if array.dtype == np.int64 else onnx.TensorProto.UINT8
    return onnx.TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes())


def change(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Let ``node`` compute something that this module does not."""
    if node.op_type == "Cast":
        node.attribute[0].i = onnx.TensorProto.DOUBLE
        return
    place, array = {
        "Slice": (3, np.array([-1])),
        "Reshape": (1, np.array([0, -1, 32])),
        "BitShift": (1, np.array(8, np.uint8)),
    }.get(node.op_type, (1, np.ones((1, 1), np.uint8)))
    model.graph.initializer.append(constant("other", array))
    node.input[place] = "other"


@pytest.mark.parametrize("kind", ["Slice", "Reshape", "Cast", "BitShift", "BitwiseAnd", "BitwiseOr"])
def test_what_is_unusual_is_left_to_onnx_runtime(kind: str, saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    # Casts of scales are left to ONNX Runtime anyway.
    where = "/rotary_emb.0/" if kind == "Cast" else "/layers.0."
    nodes = [node for node in model.graph.node if node.op_type == kind and where in f"/{node.name}"]
    change(nodes[0], model)
    path.write_bytes(model.SerializeToString())
    assert folded(path, threads=1, run=run_once) is None


def test_weights_that_end_early(saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    weights = path.with_name("model.onnx.data")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert folded(path, threads=1, run=run_once) is None
    with pytest.raises(BadArtifact, match="cannot load"):
        ortlm.load(tmp_path / "out")


def test_a_damaged_graph(saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 20):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged[: rng.integers(1, len(whole) + 1)])
        folded(path, threads=1, run=run_once)  # whatever it returns, nothing is raised


def test_values_that_a_caller_may_replace_are_no_constants(saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    codes = {node.input[0] for node in model.graph.node if node.op_type == "Slice"}
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            model.graph.input.append(onnx.ValueInfoProto(name=tensor.name))
    path.write_bytes(model.SerializeToString())
    found = folded(path, threads=1, run=run_once)
    # The tables still are.
    assert found is not None
    kinds = [node.op_type for node in onnx.load_from_string(found.graph).graph.node]
    assert "BitShift" in kinds


def test_values_that_are_outputs_too(saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    name = next(node for node in model.graph.node if node.op_type == "BitwiseOr").output[0]
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    path.write_bytes(model.SerializeToString())
    found = folded(path, threads=1, run=run_once)
    assert found is not None
    assert any(name in node.output for node in onnx.load_from_string(found.graph).graph.node)
