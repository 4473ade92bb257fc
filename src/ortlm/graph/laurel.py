"""A learned residual of low rank (LAuReL)."""

from __future__ import annotations

from ortlm.graph.builder import Builder, Shape, Value
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.norm import norm
from ortlm.spec import Laurel


def laurel(g: Builder, spec: Laurel, x: Value, *, layer: int, parameters: Parameters, shape: Shape) -> Value:
    """Return what the residual adds to the stream, of ``x`` [B, S, H], which goes into the mixer."""
    at, module = f"layers.{layer}", f"layers.{layer}.laurel"
    [y] = linear(
        g, x, [f"{at}.laurel_left"],
        parameters=parameters, module=f"{module}.left_proj", shape=shape, layer=layer,
    )  # fmt: skip
    [y] = linear(
        g, y, [f"{at}.laurel_right"],
        parameters=parameters, module=f"{module}.right_proj", shape=(*shape[:-1], spec.rank), layer=layer,
    )  # fmt: skip
    y = norm(
        g, y, spec.norm, f"{at}.laurel_post", parameters=parameters, module=f"{module}.norm", shape=shape
    )
    return g.op("Add", x, y, shape=shape, name=node_path(module))
