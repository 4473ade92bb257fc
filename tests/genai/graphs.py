"""The folder of the official builder with another graph, as others export them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - it changes what others built

Graph = onnx.GraphProto
INTEGERS = ("input_ids", "attention_mask", "position_ids")


def remade(
    source: Path,
    target: Path,
    change: Callable[[Graph], Any] = lambda graph: None,
    *,
    config: Callable[[dict[str, Any]], Any] = lambda found: None,
) -> Path:
    """Return ``target``, a copy of ``source`` whose graph and configuration were changed."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name not in ("model.onnx", "genai_config.json"):
            os.link(path, target / path.name)
    model = onnx.load(source / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, target / "model.onnx")
    found = json.loads((source / "genai_config.json").read_text())
    config(found)
    (target / "genai_config.json").write_text(json.dumps(found))
    return target


def rename_input(graph: Graph, name: str, new: str) -> None:
    """Let the nodes that read ``name`` read ``new``."""
    for node in graph.node:
        for at, found in enumerate(node.input):
            if found == name:
                node.input[at] = new


def rename_output(graph: Graph, name: str, new: str) -> None:
    """Let the node that writes ``name`` write ``new``."""
    for node in graph.node:
        for at, found in enumerate(node.output):
            if found == name:
                node.output[at] = new


def constant(graph: Graph, name: str, value: Any) -> str:
    """Add a constant and return its name."""
    graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return name


def with_int32(graph: Graph) -> None:
    """Read token ids, mask and positions as int32."""
    for given in graph.input:
        if given.name in INTEGERS:
            given.type.tensor_type.elem_type = TensorProto.INT32
            rename_input(graph, given.name, f"{given.name}_wide")
            cast = helper.make_node("Cast", [given.name], [f"{given.name}_wide"], to=TensorProto.INT64)
            graph.node.insert(0, cast)


def with_kept_logits(graph: Graph, shape: tuple[int, ...] = (1,)) -> None:
    """Give the logits of the last ``num_logits_to_keep`` columns, 0 for all; the input has no default."""
    graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, shape))
    rename_output(graph, "logits", "all_logits")
    constant(graph, "keep_shape", np.array([1], np.int64))
    constant(graph, "keep_end", np.array([2**31], np.int64))
    constant(graph, "keep_axis", np.array([1], np.int64))
    graph.node.extend(
        [
            helper.make_node("Reshape", ["num_logits_to_keep", "keep_shape"], ["keep_count"]),
            helper.make_node("Neg", ["keep_count"], ["keep_start"]),
            helper.make_node("Slice", ["all_logits", "keep_start", "keep_end", "keep_axis"], ["logits"]),
        ]
    )


def with_logit_adapter(graph: Graph, *, optional: bool = True, vocab: int = 352) -> None:
    """Add the input ``bias`` float32 [V], by default zeros, to the logits."""
    graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, [vocab]))
    if optional:
        graph.initializer.append(numpy_helper.from_array(np.zeros(vocab, np.float32), "bias"))
    rename_output(graph, "logits", "plain_logits")
    graph.node.append(helper.make_node("Add", ["plain_logits", "bias"], ["logits"]))


def with_combined_cache(graph: Graph, *, layers: int = 3, heads: int = 2, width: int = 16) -> None:
    """Carry one tensor [2, B, K, T, D] for each layer."""
    constant(graph, "kv_zero", np.array(0, np.int64))
    constant(graph, "kv_one", np.array(1, np.int64))
    constant(graph, "kv_axis", np.array([0], np.int64))
    kept_in = [given for given in graph.input if not given.name.startswith("past_key_values.")]
    kept_out = [given for given in graph.output if not given.name.startswith("present.")]
    first, last = [], []
    for layer in range(layers):
        shape = [2, "batch_size", heads, f"length_{layer}", width]
        kept_in.append(helper.make_tensor_value_info(f"past_{layer}", TensorProto.FLOAT, shape))
        kept_out.append(helper.make_tensor_value_info(f"present_{layer}", TensorProto.FLOAT, shape))
        for part, at in (("key", "kv_zero"), ("value", "kv_one")):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            first.append(helper.make_node("Gather", [f"past_{layer}", at], [past], axis=0))
            last.append(helper.make_node("Unsqueeze", [present, "kv_axis"], [f"{present}.one"]))
        ones = [f"present.{layer}.{part}.one" for part in ("key", "value")]
        last.append(helper.make_node("Concat", ones, [f"present_{layer}"], axis=0))
    del graph.input[:], graph.output[:]
    graph.input.extend(kept_in)
    graph.output.extend(kept_out)
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)


def combined(found: dict[str, Any]) -> None:
    """Let a configuration name the tensors of ``with_combined_cache``."""
    decoder = found["model"]["decoder"]
    for role in ("past_key_names", "past_value_names"):
        del decoder["inputs"][role]
    for role in ("present_key_names", "present_value_names"):
        del decoder["outputs"][role]
    decoder["inputs"]["past_names"] = "past_%d"
    decoder["outputs"]["present_names"] = "present_%d"
    found["search"]["past_present_share_buffer"] = False
