"""Graphs written by hand are what the onnx package reads, and run."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from ortlm.dtypes import dtype
from ortlm.runtime.engine.small_graphs import SmallGraph


def test_a_graph_is_read_and_runs():
    graph = SmallGraph("both", 17)
    kind = dtype("fp32").onnx
    x = graph.input("x", kind, ["rows", "columns"])
    picked = graph.op("Gather", x, graph.constant("at", np.array([2, 0], np.int64)), axis=-1)
    graph.op("Add", picked, graph.constant("one", np.array(1, np.float32)), name="y")
    graph.output("y", kind, ["rows", "columns"])
    model = graph.model()
    read = onnx.load_from_string(model)
    onnx.checker.check_model(read, full_check=True)
    for value in (*read.graph.input, *read.graph.output):
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["rows", "columns"]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)})
    np.testing.assert_array_equal(found, [[3, 1], [6, 4]])
