"""Causal convolutions of single channels, which carry their last inputs from step to step."""

from __future__ import annotations

from ortlm.graph.builder import Builder, Value
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.step import Step
from ortlm.spec import ShortConv

_LEAD = ("batch_size", "sequence_length")


def short_conv(
    g: Builder,
    spec: ShortConv,
    x: Value,
    past: Value,
    *,
    layer: int,
    step: Step,
    parameters: Parameters,
    hidden: int,
) -> tuple[Value, Value]:
    """Mix ``x`` [B, S, H] with the tokens before; returns [B, S, width] and the state after it."""
    at, module = f"layers.{layer}", f"layers.{layer}.conv"
    path, shape = node_path(module), (*_LEAD, spec.width)
    [three] = linear(
        g, x, [f"{at}.in"],
        parameters=parameters, module=f"{module}.in_proj", shape=(*_LEAD, hidden), layer=layer,
    )  # fmt: skip
    b, c, x = g.ops(
        "Split",
        [three, g.integers(*[spec.width] * 3)],
        outputs=[(g.dtype, shape)] * 3,
        name=path,
        attributes={"axis": -1},
    )
    x = g.op("Mul", b, x, shape=shape, name=path)
    y, present = causal_conv(
        g, x, past, name=f"{at}.conv", module=module, kernel=spec.kernel, step=step, parameters=parameters
    )
    return g.op("Mul", c, y, shape=shape, name=path), present


def causal_conv(
    g: Builder,
    x: Value,
    past: Value,
    *,
    name: str,
    module: str,
    kernel: int,
    step: Step,
    parameters: Parameters,
) -> tuple[Value, Value]:
    """Convolve each channel of ``x`` [B, S, C] with its own weights ``name``, [C, kernel].

    ``past`` [B, C, kernel - 1] is what came before ``x``, the newest last. Returns [B, S, C], and the last
    ``kernel`` - 1 inputs of each row's real tokens: padding after them does not count.

    ONNX Runtime's CausalConvWithState takes padding for tokens, is unknown to older ones, and takes longer on
    CPU than these few operators.
    """
    path, weight = node_path(module), parameters[f"{name}.weight"]
    width, held = weight.shape[0], kernel - 1
    shape, column = (*_LEAD, width), ("batch_size", held, width)
    everything = ("batch_size", "sequence_and_state", width)
    before = g.op("Transpose", past, shape=column, name=path, perm=(0, 2, 1))
    full = g.op("Concat", before, x, shape=everything, name=path, axis=1)
    taps = g.ops(
        "Split",
        [g.matrix([weight], f"{module}.weight", transposed=True), g.integers(*[1] * kernel)],
        outputs=[(g.dtype, (1, width))] * kernel,
        name=f"{path}/taps",
        attributes={"axis": 0},
    )
    y: Value | None = None
    for i, tap in enumerate(taps):
        # The last tap is for the token itself.
        part = x
        if i < held:
            part = g.op(
                "Slice", full, g.integers(i), g.integers(i - held), g.integers(1), shape=shape, name=path
            )
        part = g.op("Mul", part, tap, shape=shape, name=path)
        y = part if y is None else g.op("Add", y, part, shape=shape, name=path)
    assert y is not None
    if f"{name}.bias" in parameters:
        y = g.op("Add", y, g.weight(parameters[f"{name}.bias"]), shape=shape, name=path)
    last = g.op("GatherND", full, step.ends(held), shape=column, name=f"{path}/state", batch_dims=1)
    present = g.op("Transpose", last, shape=("batch_size", width, held), name=f"{path}/state", perm=(0, 2, 1))
    return y, present
