"""Codes widened before ONNX Runtime loads a graph: the same logits, fewer operators, and nothing guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact
from ortlm.runtime.engine import session as sessions
from ortlm.runtime.engine.widened_codes import with_widened_codes

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
    data = with_widened_codes(path, threads=2)
    assert data is not None
    kinds = [node.op_type for node in onnx.load_from_string(data).graph.node]
    assert not {"BitShift", "BitwiseAnd", "BitwiseOr"} & set(kinds)
    path.with_name("widened.onnx").write_bytes(data)
    onnx.checker.check_model(path.with_name("widened.onnx"), full_check=True)
    here = ortlm.load(tmp_path / "out").logits(IDS)
    monkeypatch.setattr(sessions, "with_widened_codes", lambda *_, **__: None)
    assert np.array_equal(here, ortlm.load(tmp_path / "out").logits(IDS))


def test_graphs_without_such_codes_are_loaded_as_they_are(saved: Any, tmp_path: Path) -> None:
    assert with_widened_codes(built(saved, tmp_path / "out", bits=4), threads=1) is None


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
    nodes = [node for node in model.graph.node if node.op_type == kind and "/layers.0." in f"/{node.name}"]
    change(nodes[0], model)
    path.write_bytes(model.SerializeToString())
    assert with_widened_codes(path, threads=1) is None


def test_weights_that_end_early(saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    weights = path.with_name("model.onnx.data")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert with_widened_codes(path, threads=1) is None
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
        with_widened_codes(path, threads=1)  # whatever it returns, nothing is raised


def test_values_that_a_caller_may_replace_are_no_constants(saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    codes = {node.input[0] for node in model.graph.node if node.op_type == "Slice"}
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            model.graph.input.append(onnx.ValueInfoProto(name=tensor.name))
    path.write_bytes(model.SerializeToString())
    data = with_widened_codes(path, threads=1)
    # fp16 scales are still widened.
    assert data is not None
    kinds = [node.op_type for node in onnx.load_from_string(data).graph.node]
    assert "BitShift" in kinds


def test_values_that_are_outputs_too(saved: Any, tmp_path: Path) -> None:
    path = built(saved, tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    name = next(node for node in model.graph.node if node.op_type == "BitwiseOr").output[0]
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    path.write_bytes(model.SerializeToString())
    data = with_widened_codes(path, threads=1)
    assert data is not None
    assert any(name in node.output for node in onnx.load_from_string(data).graph.node)
