"""Per-layer embeddings: what each layer gets of every token, and how it adds it to the residual stream."""

from __future__ import annotations

from ortlm.graph.builder import Builder, Shape, Value
from ortlm.graph.linear import Parameters, linear, looked_up, node_path
from ortlm.graph.mlp import activate
from ortlm.graph.norm import norm
from ortlm.spec import Decoder, Norm, PerLayerInputs


def per_layer_inputs(g: Builder, spec: Decoder, ids: Value, x: Value, weights: Parameters) -> list[Value]:
    """Return the vectors [B, S, width] of every layer for token ``ids`` int64 [B, S] with embeddings ``x``."""
    inputs = spec.per_layer_inputs
    if inputs is None:
        return []
    path, count, lead = "/model/per_layer_inputs", len(spec.layers), ("batch_size", "sequence_length")
    wide, apart = (*lead, count * inputs.width), (*lead, count, inputs.width)
    if inputs.vocab < spec.vocab:
        known = g.op("Less", ids, g.integer(inputs.vocab), shape=lead, dtype="bool", name=path)
        ids = g.op("Where", known, ids, g.integer(0), shape=lead, dtype="int64", name=path)
    rows = looked_up(
        g, ids, weights["per_layer_embed.weight"],
        within=inputs.width, module="per_layer_embed", shape=wide, path=f"{path}/table",
    )  # fmt: skip
    rows = g.op("Mul", rows, g.number(inputs.scale), shape=wide, name=path)
    [mapped] = linear(
        g, x, [f"layers.{i}.per_layer_map" for i in range(count)],
        parameters=weights, module="per_layer_inputs.map_proj", shape=(*lead, spec.hidden),
    )  # fmt: skip
    mapped = g.op("Mul", mapped, g.number(inputs.map_scale), shape=wide, name=path)
    mapped = g.op("Reshape", mapped, g.integers(0, 0, count, inputs.width), shape=apart, name=path)
    mapped = norm(
        g,
        mapped,
        inputs.norm,
        "per_layer_map_norm",
        parameters=weights,
        module="per_layer_inputs.norm",
        shape=apart,
    )
    mapped = g.op("Reshape", mapped, g.integers(0, 0, wide[-1]), shape=wide, name=path)
    both = g.op("Add", rows, mapped, shape=wide, name=path)
    both = g.op("Mul", both, g.number(2**-0.5), shape=wide, name=path)
    return g.ops(
        "Split", [both, g.integers(*[inputs.width] * count)],
        outputs=[(g.dtype, (*lead, inputs.width))] * count, name=path, attributes={"axis": -1},
    )  # fmt: skip


def per_layer_branch(
    g: Builder,
    spec: PerLayerInputs,
    x: Value,
    per_layer: Value,
    post: Norm,
    *,
    layer: int,
    parameters: Parameters,
    shape: Shape,
) -> Value:
    """Return what ``layer`` adds to the stream ``x`` [B, S, H], of its vectors ``per_layer`` [B, S, width]."""
    at, module = f"layers.{layer}", f"layers.{layer}.per_layer_input"
    path, inner = node_path(module), (*shape[:-1], spec.width)
    [y] = linear(
        g, x, [f"{at}.per_layer_gate"],
        parameters=parameters, module=f"{module}.gate_proj", shape=shape, layer=layer,
    )  # fmt: skip
    y = activate(g, y, spec.act, shape=inner, path=path)
    y = g.op("Mul", y, per_layer, shape=inner, name=path)
    [y] = linear(
        g, y, [f"{at}.per_layer_out"],
        parameters=parameters, module=f"{module}.out_proj", shape=inner, layer=layer,
    )  # fmt: skip
    return norm(
        g, y, post, f"{at}.per_layer_post", parameters=parameters, module=f"{module}.norm", shape=shape
    )
