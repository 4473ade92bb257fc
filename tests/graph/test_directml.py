"""Which nodes of graphs for DirectML have a kernel there, by ONNX Runtime's own list; none was run on Windows.

``directml_kernels.json`` has the operators that graphs here may hold, the versions of their definitions that
kernels are registered for, and the types of their first input. ONNX Runtime takes a kernel without a last version
for exactly that version. What has no kernel runs on the CPU, with copies.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.target import TARGETS

KERNELS = json.loads((Path(__file__).parent / "directml_kernels.json").read_text(encoding="utf-8"))["kernels"]
# Norms that no sum comes before, which have no kernel: the first one, and those of queries, keys and outputs.
NORMS = {
    "phi3": 1, "phi3-longrope": 1, "phi-2": 0, "llama3": 1, "mistral": 1, "gemma": 1, "gemma3": 17, "qwen2": 1,
    "qwen3": 5, "granite": 1, "olmo2": 8,
}  # fmt: skip
# ONNX Runtime takes it apart where it has no kernel.
GELU = {"phi-2", "gemma", "gemma3"}
# Definitions of operator set 22 and 23, for which there is no kernel: shapes, which the CPU computes anyway, ...
SHAPES = {"Cast", "Shape", "Squeeze", "Unsqueeze"}
# ... the tables of longrope, once a step, ...
TABLES = {"Cos", "Sin"}
# ... embeddings, once a step, and what some families have in each layer.
ACTIVATIONS = {"GatherBlockQuantized", "Gelu", "Reshape", "RMSNormalization"}


def without_kernel(model: onnx.ModelProto) -> Counter[str]:
    """Return how many nodes of each operator have no kernel."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    found: Counter[str] = Counter()
    for node in model.graph.node:
        kernel = KERNELS[node.domain or "ai.onnx"].get(node.op_type)
        since = 1
        if not node.domain:
            since = onnx.defs.get_schema(node.op_type, max_inclusive_version=versions[""]).since_version
        kind = onnx.TensorProto.DataType.Name(types[node.input[0]]).lower()
        if kernel is None or since not in kernel["since"] or kind not in kernel["types"]:
            found[node.op_type] += 1
    return found


@pytest.mark.parametrize("precision", list(TARGETS["dml"].precisions))
@pytest.mark.parametrize("name", NORMS)
def test_kernels(name: str, precision: str, saved: Any, tmp_path: Path) -> None:
    options = BuildOptions(recipe="fast" if precision == "int4" else None)
    checkpoint = saved(name)
    built = ortlm.build(
        checkpoint.folder, tmp_path / "out", precision=precision, target="dml", options=options
    )
    found = without_kernel(onnx.load(built.graph_path(), load_external_data=False))
    assert set(found) <= SHAPES | TABLES | ACTIVATIONS
    # Matrices, attention and rotation always have one.
    assert found["GatherBlockQuantized"] == (precision == "int4")
    assert found["RMSNormalization"] == NORMS[name]
    assert found["Gelu"] == (checkpoint.model.config.num_hidden_layers if name in GELU else 0)
