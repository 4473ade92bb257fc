"""Gated DeltaNet: linear attention whose state is decayed and corrected with each token."""

from __future__ import annotations

import numpy as np

from ortlm.graph.builder import MICROSOFT, Builder, Value
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.mlp import activate
from ortlm.graph.norm import norm
from ortlm.graph.short_conv import causal_conv
from ortlm.graph.step import Step
from ortlm.spec import DeltaNet

_LEAD = ("batch_size", "sequence_length")
# The first ONNX Runtime whose LinearAttention was run against a plain recurrence.
LINEAR_ATTENTION = (1, 26)
# What the squares of a query or key sum up to at least, as in the published code.
_LEAST = 1e-6


def delta_net(
    g: Builder,
    spec: DeltaNet,
    x: Value,
    conv: Value,
    recurrent: Value,
    *,
    layer: int,
    step: Step,
    parameters: Parameters,
    hidden: int,
) -> tuple[Value, Value, Value]:
    """Mix ``x`` [B, S, H] with the tokens before; returns [B, S, width] and the two states after it.

    Padding after a row's tokens leaves the states as they are.
    """
    at, module = f"layers.{layer}", f"layers.{layer}.linear_attn"
    path, inputs, shape = node_path(module), (*_LEAD, hidden), (*_LEAD, spec.width)
    mixed, z = linear(
        g, x, [f"{at}.in", f"{at}.z"],
        parameters=parameters, module=f"{module}.in_proj", shape=inputs, layer=layer, apart=True,
    )  # fmt: skip
    b, a = linear(
        g, x, [f"{at}.b", f"{at}.a"],
        parameters=parameters, module=f"{module}.gates_proj", shape=inputs, layer=layer, apart=True,
    )  # fmt: skip
    mixed, conv = causal_conv(
        g, mixed, conv, name=f"{at}.conv", module=f"{module}.conv", kernel=spec.kernel, step=step,
        parameters=parameters,
    )  # fmt: skip
    mixed = activate(g, mixed, "silu", shape=(*_LEAD, spec.mixed), path=path)
    q, k, v = g.ops(
        "Split",
        [mixed, g.integers(spec.keys, spec.keys, spec.width)],
        outputs=[(g.dtype, (*_LEAD, size)) for size in (spec.keys, spec.keys, spec.width)],
        name=path,
        attributes={"axis": -1},
    )
    # Scores are scaled here once, and not in the operator.
    q, k = (
        _units(g, y, spec, length=length, path=f"{path}/{name}")
        for y, name, length in ((q, "q", spec.key_dim**-0.5), (k, "k", 1.0))
    )
    beta, decay = _gates(g, spec, b, a, at, step, parameters, f"{path}/gates")
    g.need(LINEAR_ATTENTION)
    y, recurrent = g.ops(
        "LinearAttention",
        [q, k, v, recurrent, decay, beta],
        outputs=[(g.dtype, shape), (g.dtype, ("batch_size", spec.value_heads, spec.key_dim, spec.value_dim))],
        name=path,
        domain=MICROSOFT,
        attributes={
            "q_num_heads": spec.value_heads,
            "kv_num_heads": spec.value_heads,
            "scale": 1.0,
            "update_rule": "gated_delta",
        },
    )
    split = (*_LEAD, spec.value_heads, spec.value_dim)
    y = g.op("Reshape", y, g.integers(0, 0, spec.value_heads, spec.value_dim), shape=split, name=path)
    y = norm(g, y, spec.norm, f"{at}.out_norm", parameters=parameters, module=f"{module}.norm", shape=split)
    y = g.op("Reshape", y, g.integers(0, 0, spec.width), shape=shape, name=path)
    z = activate(g, z, "silu", shape=shape, path=f"{path}/z")
    return g.op("Mul", y, z, shape=shape, name=path), conv, recurrent


def _units(g: Builder, x: Value, spec: DeltaNet, *, length: float, path: str) -> Value:
    """Return queries or keys [B, S, K · D] of this length each, repeated for every value head."""
    heads, size = spec.key_heads, spec.key_dim
    split = (*_LEAD, heads, size)
    x = g.op("Reshape", x, g.integers(0, 0, heads, size), shape=split, name=path)
    # x / sqrt(sum of squares) is the mean's root with a weight.
    weight = np.full(size, length * size**-0.5, np.float32)
    scale = g.constant(weight, f"{g.dtype}/unit_{size}_{length:g}")
    x = g.op("RMSNormalization", x, scale, shape=split, name=path, axis=-1, epsilon=_LEAST / size)
    each = spec.value_heads // heads
    if each > 1:
        x = g.op("Unsqueeze", x, g.integers(3), shape=(*_LEAD, heads, 1, size), name=path)
        x = g.op("Expand", x, g.integers(1, 1, 1, each, 1), shape=(*_LEAD, heads, each, size), name=path)
    width = spec.value_heads * size
    return g.op("Reshape", x, g.integers(0, 0, width), shape=(*_LEAD, width), name=path)


def _gates(
    g: Builder, spec: DeltaNet, b: Value, a: Value, at: str, step: Step, parameters: Parameters, path: str
) -> tuple[Value, Value]:
    """Return the update rate and the logarithm of the decay, [B, S, heads] each: none of both for padding."""
    shape = (*_LEAD, spec.value_heads)
    beta = g.op("Sigmoid", b, shape=shape, name=path)
    beta = g.op("Mul", beta, step.real(), shape=shape, name=path)
    rate = g.op("Exp", g.weight(parameters[f"{at}.a_log.weight"]), shape=(spec.value_heads,), name=path)
    rate = g.op("Neg", rate, shape=(spec.value_heads,), name=path)
    decay = g.op("Add", a, g.weight(parameters[f"{at}.dt_bias.weight"]), shape=shape, name=path)
    decay = g.op("Softplus", decay, shape=shape, name=path)
    decay = g.op("Mul", decay, rate, shape=shape, name=path)
    return beta, g.op("Mul", decay, step.real(), shape=shape, name=path)
