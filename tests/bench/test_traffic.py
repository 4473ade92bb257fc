"""Bytes and multiplications as they follow from a graph, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from ortlm.artifact import Graph
from ortlm.bench.traffic import cache_bytes, packed_bits, read_traffic
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact


@pytest.mark.parametrize(
    ("bits", "block", "level", "zero_points", "expected"),
    [
        (4, 32, 4, False, 6.0),
        (4, 128, 4, True, 4.5),
        (8, 32, 4, False, 10.0),
        (4, 32, 0, False, 5.0),
        (4, 32, 0, True, 5.125),
        (8, 32, 0, False, 8 + 1 + 64),
    ],
)
def test_packed_bits(bits, block, level, zero_points, expected):
    assert packed_bits(bits, block, level=level, zero_points=zero_points) == expected


def test_a_window_bounds_what_is_read():
    assert cache_bytes([(10, None), (10, 64)], 100) == 10 * 100 + 10 * 64
    assert cache_bytes([(10, None), (10, 64)], 30.5) == 2 * 305


def stored(name, shape, kind=np.float32):
    return ir.Value(name=name, const_value=ir.tensor(np.zeros(shape, kind), name=name))


def saved(path, nodes, x, y, initializers, optional=()):
    y.name, y.shape, y.type = "logits", ir.Shape((1, 1, 8)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        [y],
        nodes=nodes,
        initializers=[*initializers, *optional],
        opset_imports={"": 21, "com.microsoft": 1},
    )
    ir.save(ir.Model(graph, ir_version=10), path)
    keep = {"logits_to_keep": optional[0].name} if optional else {}
    return read_traffic(path, Graph("g", {"input_ids": "x"}, {"logits": "logits"}, (), keep))


def test_products_of_a_graph(tmp_path):
    x = ir.Value(name="x", shape=ir.Shape((1, 3, 48)), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [
        stored("codes", (16, 2, 16), np.uint8), stored("scales", (16, 2)), stored("w", (8, 16), np.float16)
    ]  # fmt: skip
    numbers = {"K": 48, "N": 16, "bits": 4, "block_size": 32, "accuracy_level": 4}
    first = ir.Node(
        "com.microsoft", "MatMulNBits", [x, *weights[:2]], [ir.AttrInt64(k, n) for k, n in numbers.items()]
    )
    rotated = ir.Node("", "Transpose", [weights[2]], [ir.AttrInt64s("perm", [1, 0])])
    last = ir.Node("", "MatMul", [first.outputs[0], rotated.outputs[0]])
    scores = ir.Node("", "MatMul", [last.outputs[0], last.outputs[0]])
    found = saved(tmp_path / "m.onnx", [first, rotated, last, scores], x, scores.outputs[0], weights)
    assert [product.operator for product in found.products] == ["MatMulNBits", "MatMul"]
    # 48 columns take two blocks of 32.
    assert found.weight_bytes == 16 * 64 * 6 // 8 + 2 * 8 * 16
    assert found.multiplications == 48 * 16 + 8 * 16
    # One row of logits: the head is multiplied once for a whole prompt.
    assert found.prompt_multiplications(10) == 10 * 48 * 16 + 8 * 16


def test_positions_that_nobody_asks_for(tmp_path):
    x = ir.Value(name="x", shape=ir.Shape((1, 3, 16)), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [stored("a", (16, 16)), stored("b", (16, 16)), stored("c", (16, 8))]
    keep = ir.Value(name="keep", const_value=ir.tensor(np.array([1], np.int64), name="keep"))
    first = ir.Node("", "MatMul", [x, weights[0]])
    cut = ir.Node("", "Gather", [first.outputs[0], keep], [ir.AttrInt64("axis", 1)])
    middle = ir.Node("", "MatMul", [cut.outputs[0], weights[1]])
    last = ir.Node("", "MatMul", [middle.outputs[0], weights[2]])
    found = saved(tmp_path / "m.onnx", [first, cut, middle, last], x, last.outputs[0], weights, [keep])
    assert [product.kept_only for product in found.products] == [False, True, True]


def test_a_build_by_its_own_account(build):
    lm = build("phi3", "int4")
    found = read_traffic(lm.artifact.graph_path("decoder"), lm.manifest.graphs["decoder"])
    config = lm.manifest.info
    layers = config["layers"]
    assert len(found.products) == 4 * layers + 1
    # The last layer's products after its keys and values, and the head.
    assert sum(product.kept_only for product in found.products) == 4
    assert found.prompt_multiplications(1) == found.multiplications


@pytest.mark.parametrize(("precision", "bits"), [("int4", 0), ("int4", 5), ("fp32", 0)])
def test_a_token_reads_the_experts_that_it_chooses(build, precision, bits):
    """Two of four experts of 3 x 64 x 128 weights, in two layers."""
    lm = build("mixtral", precision, BuildOptions(bits=bits) if bits else None)
    found = read_traffic(lm.artifact.graph_path("decoder"), lm.manifest.graphs["decoder"])
    experts = [p for p in found.products if p.operator in ("QMoE", "MoE")]
    assert [p.weights for p in experts] == [2 * 3 * 64 * 128] * 2
    per_weight = {"fp32": 4.0, "int4": 1.25 if bits else 5.125 / 8}[precision]
    assert [p.packed_bytes for p in experts] == [experts[0].weights * per_weight] * 2


def test_a_file_that_is_no_graph(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no")
    with pytest.raises(BadArtifact, match=r"m\.onnx cannot be read as an ONNX file"):
        read_traffic(path, Graph("m.onnx", {}, {}, ()))
