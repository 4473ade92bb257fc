"""Mamba-2: a state space with one decay for each head, as gated linear attention."""

from __future__ import annotations

import numpy as np

from ortlm.graph.builder import MICROSOFT, Builder, Value
from ortlm.graph.delta_net import LINEAR_ATTENTION
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.mlp import activate
from ortlm.graph.norm import norm
from ortlm.graph.short_conv import causal_conv
from ortlm.graph.step import Step
from ortlm.spec import Mamba2

_LEAD = ("batch_size", "sequence_length")


def mamba(
    g: Builder,
    spec: Mamba2,
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
    at, module = f"layers.{layer}", f"layers.{layer}.mamba"
    path, inputs, shape = node_path(module), (*_LEAD, hidden), (*_LEAD, spec.width)
    z, mixed = linear(
        g, x, [f"{at}.z", f"{at}.in"],
        parameters=parameters, module=f"{module}.in_proj", shape=inputs, layer=layer, apart=True,
    )  # fmt: skip
    [times] = linear(
        g, x, [f"{at}.a"], parameters=parameters, module=f"{module}.dt_proj", shape=inputs, layer=layer
    )
    mixed, conv = causal_conv(
        g, mixed, conv, name=f"{at}.conv", module=f"{module}.conv", kernel=spec.kernel, step=step,
        parameters=parameters,
    )  # fmt: skip
    mixed = activate(g, mixed, "silu", shape=(*_LEAD, spec.mixed), path=path)
    sizes = (spec.width, spec.groups * spec.state, spec.groups * spec.state)
    x, k, q = g.ops(
        "Split",
        [mixed, g.integers(*sizes)],
        outputs=[(g.dtype, (*_LEAD, size)) for size in sizes],
        name=path,
        attributes={"axis": -1},
    )
    times, decay = _times(g, spec, times, at, step, parameters, f"{path}/dt")
    heads = (*_LEAD, spec.heads, spec.head_dim)
    x = g.op("Reshape", x, g.integers(0, 0, spec.heads, spec.head_dim), shape=heads, name=path)
    times = g.op("Unsqueeze", times, g.integers(3), shape=(*_LEAD, spec.heads, 1), name=path)
    v = g.op("Mul", x, times, shape=heads, name=path)
    v = g.op("Reshape", v, g.integers(0, 0, spec.width), shape=shape, name=path)
    g.need(LINEAR_ATTENTION)
    y, recurrent = g.ops(
        "LinearAttention",
        [_each(g, q, spec, f"{path}/q"), _each(g, k, spec, f"{path}/k"), v, recurrent, decay],
        outputs=[(g.dtype, shape), (g.dtype, ("batch_size", spec.heads, spec.state, spec.head_dim))],
        name=path,
        domain=MICROSOFT,
        attributes={
            "q_num_heads": spec.heads,
            "kv_num_heads": spec.heads,
            "scale": 1.0,
            "update_rule": "gated",
        },
    )
    skip = g.op(
        "Unsqueeze",
        g.weight(parameters[f"{at}.skip.weight"]),
        g.integers(1),
        shape=(spec.heads, 1),
        name=path,
    )
    x = g.op("Mul", x, skip, shape=heads, name=f"{path}/skip")
    x = g.op("Reshape", x, g.integers(0, 0, spec.width), shape=shape, name=f"{path}/skip")
    y = g.op("Add", y, x, shape=shape, name=f"{path}/skip")
    z = activate(g, z, "silu", shape=shape, path=f"{path}/z")
    y = g.op("Mul", y, z, shape=shape, name=path)
    return _normed(g, y, spec, f"{at}.out_norm", parameters, f"{module}.norm"), conv, recurrent


def _times(
    g: Builder, spec: Mamba2, x: Value, at: str, step: Step, parameters: Parameters, path: str
) -> tuple[Value, Value]:
    """Return how long each token counts, and the logarithm of the decay, [B, S, heads] each: 0 for padding."""
    shape = (*_LEAD, spec.heads)
    x = g.op("Add", x, g.weight(parameters[f"{at}.dt_bias.weight"]), shape=shape, name=path)
    x = g.op("Softplus", x, shape=shape, name=path)
    x = g.op("Mul", x, step.real(), shape=shape, name=path)
    rate = g.op("Exp", g.weight(parameters[f"{at}.a_log.weight"]), shape=(spec.heads,), name=path)
    rate = g.op("Neg", rate, shape=(spec.heads,), name=path)
    return x, g.op("Mul", x, rate, shape=shape, name=path)


def _each(g: Builder, x: Value, spec: Mamba2, path: str) -> Value:
    """Return what groups of heads share, [B, S, groups · N], for every head."""
    each, width = spec.heads // spec.groups, spec.heads * spec.state
    split = (*_LEAD, spec.groups, 1, spec.state)
    x = g.op("Reshape", x, g.integers(0, 0, spec.groups, 1, spec.state), shape=split, name=path)
    wide = (*_LEAD, spec.groups, each, spec.state)
    x = g.op("Expand", x, g.integers(1, 1, 1, each, 1), shape=wide, name=path)
    return g.op("Reshape", x, g.integers(0, 0, width), shape=(*_LEAD, width), name=path)


def _normed(g: Builder, x: Value, spec: Mamba2, name: str, parameters: Parameters, module: str) -> Value:
    """Normalize ``x`` [B, S, width] over the channels of each group."""
    shape = (*_LEAD, spec.width)
    if spec.groups == 1:
        return norm(g, x, spec.norm, name, parameters=parameters, module=module, shape=shape)
    path, size = node_path(module), spec.width // spec.groups
    split = (*_LEAD, spec.groups, size)
    x = g.op("Reshape", x, g.integers(0, 0, spec.groups, size), shape=split, name=path)
    ones = g.constant(np.ones(size, np.float32), f"{g.dtype}/ones_{size}")
    x = g.op("RMSNormalization", x, ones, shape=split, name=path, axis=-1, epsilon=spec.norm.eps)
    x = g.op("Reshape", x, g.integers(0, 0, spec.width), shape=shape, name=path)
    return g.op("Mul", x, g.weight(parameters[f"{name}.weight"]), shape=shape, name=path)
