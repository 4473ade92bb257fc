"""Feed-forward blocks."""

from __future__ import annotations

from ortlm.graph.builder import MICROSOFT, Builder, Shape, Value
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.spec import MLP, XIELU, GatedMLP


def activate(g: Builder, x: Value, act: str, *, shape: Shape, path: str) -> Value:
    """Apply the activation ``act`` to ``x``."""
    if act == "silu":
        # Sigmoid and Mul: ONNX Runtime fuses them on CPU, and every target knows them.
        gate = g.op("Sigmoid", x, shape=shape, name=path)
        return g.op("Mul", x, gate, shape=shape, name=path)
    if act in ("gelu", "gelu_tanh"):
        how = "tanh" if act == "gelu_tanh" else "none"
        return g.op("Gelu", x, shape=shape, name=path, approximate=how)
    if act == "quick_gelu":
        return g.op("QuickGelu", x, shape=shape, name=path, domain=MICROSOFT, alpha=1.702)
    if act in ("relu", "relu2"):
        y = g.op("Relu", x, shape=shape, name=path)
        return y if act == "relu" else g.op("Mul", y, y, shape=shape, name=path)
    raise AssertionError(f"no emitter for activation {act}")


def xielu(g: Builder, x: Value, at: str, *, parameters: Parameters, shape: Shape, path: str) -> Value:
    """Apply xIELU, whose four numbers are weights of the layer ``at``, to ``x``."""

    def op(kind: str, *inputs: Value, shape: Shape = shape) -> Value:
        return g.op(kind, *inputs, shape=shape, name=f"{path}/xielu")

    one: Shape = (1,)
    alpha_p, alpha_n, beta, eps = (g.weight(parameters[f"{at}{part}.weight"]) for part in XIELU)
    alpha_p = op("Softplus", alpha_p, shape=one)
    alpha_n = op("Add", beta, op("Softplus", alpha_n, shape=one), shape=one)
    above = op("Mul", op("Mul", alpha_p, x), x)
    below = op("Sub", op("Exp", op("Min", x, eps)), g.number(1.0))
    below = op("Mul", alpha_n, op("Sub", below, x))
    positive = g.op("Greater", x, g.number(0.0), shape=shape, dtype="bool", name=f"{path}/xielu")
    return op("Add", op("Where", positive, above, below), op("Mul", beta, x))


def _above(g: Builder, x: Value, cutoff: float, *, shape: Shape, path: str) -> Value:
    """Return how far ``x`` is above its mean plus ``cutoff`` standard deviations, over the last axis; else 0."""
    one = (*shape[:-1], 1)

    def op(kind: str, *inputs: Value, out: Shape = one, **attributes: int) -> Value:
        return g.op(kind, *inputs, shape=out, dtype="fp32", name=path, domain="", **attributes)

    # Squares of what fp16 holds may be beyond it.
    wide = x if g.dtype == "fp32" else g.cast(x, "fp32", shape, path)
    mean = op("ReduceMean", wide, g.integers(-1), keepdims=1)
    off = op("Sub", wide, mean, out=shape)
    deviation = op("Sqrt", op("ReduceMean", op("Mul", off, off, out=shape), g.integers(-1), keepdims=1))
    y = op("Relu", op("Sub", off, op("Mul", deviation, g.number(cutoff, "fp32")), out=shape), out=shape)
    return y if g.dtype == "fp32" else g.cast(y, g.dtype, shape, path)


def dense(
    g: Builder,
    spec: GatedMLP | MLP,
    x: Value,
    *,
    layer: int,
    parameters: Parameters,
    shape: Shape,
    prefix: str = "",
) -> Value:
    """Return the output [B, S, H] of a block that computes every token ``x`` [B, S, H].

    The names of its weights begin with ``prefix``.
    """
    module = f"layers.{layer}.{prefix}mlp"
    at, path = f"layers.{layer}.{prefix}", node_path(module)
    inner = (*shape[:-1], spec.intermediate)
    if isinstance(spec, MLP):
        [y] = linear(
            g, x, [f"{at}up"], parameters=parameters, module=f"{module}.up_proj", shape=shape, layer=layer
        )
        if spec.act == "xielu":
            y = xielu(g, y, at, parameters=parameters, shape=inner, path=path)
        else:
            y = activate(g, y, spec.act, shape=inner, path=path)
    else:
        packed = g.target.packed_mlp
        if g.target.packed_projections if packed is None else packed:
            gate, up = linear(
                g, x, [f"{at}gate", f"{at}up"],
                parameters=parameters, module=f"{module}.gate_up_proj", shape=shape, layer=layer, apart=True,
            )  # fmt: skip
        else:
            gate, up = (
                linear(
                    g, x, [f"{at}{p}"],
                    parameters=parameters, module=f"{module}.{p}_proj", shape=shape, layer=layer,
                )[0]
                for p in ("gate", "up")
            )  # fmt: skip
        if spec.cutoff is not None:
            gate = _above(g, gate, spec.cutoff, shape=inner, path=f"{path}/cutoff")
        y = activate(g, gate, spec.act, shape=inner, path=path)
        y = g.op("Mul", y, up, shape=inner, name=path)
    [y] = linear(
        g, y, [f"{at}down"], parameters=parameters, module=f"{module}.down_proj", shape=inner, layer=layer
    )
    return y
