"""Mixtures of experts, through ONNX Runtime's QMoE and MoE.

Both operators choose the ``k`` experts with the largest router logits and weigh them by the softmax over those:
QMoE on CPU does so whatever its attributes say. Every other router is brought to that form: logits whose softmax
over the chosen gives the ratios of the weights, and a factor for each token, the sum of its weights.
On CPU they know SiLU only. Experts with another activation, or with factors of their own, are products like all
others, each of the tokens that chose the expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ortlm.errors import BadOption, UnsupportedModel
from ortlm.graph.builder import MICROSOFT, SHARE, Builder, Shape, Value
from ortlm.graph.linear import Parameters, linear, matmul_nbits, node_path
from ortlm.graph.mlp import activate, dense
from ortlm.graph.norm import norm
from ortlm.graph.stored_codes import stored_codes
from ortlm.quant.algorithms import KEPT
from ortlm.quant.scheme import BLOCKS, Scheme
from ortlm.spec import CHOSEN_SOFTMAX, SIGMOID, SOFTMAX, SPARSE_MIXER, Experts, GatedMLP, Parameter

# The first ONNX Runtimes whose QMoE on CPU takes zero points, and 2 bits.
_QMOE, _NARROW = (1, 24), (1, 27)
# The first that knows accuracy_level for experts.
_LEVEL = (1, 31)
# Below any logarithm of a weight: never chosen.
_NEVER = -1e4


def mixture(
    g: Builder, spec: Experts, x: Value, *, layer: int, parameters: Parameters, shape: Shape
) -> Value:
    """Return the output [B, S, H] of the experts for ``x`` [B, S, H]."""
    at, module = f"layers.{layer}", f"layers.{layer}.moe"
    path = node_path(module)
    if not g.target.experts_apart and not g.target.expert_bits:
        raise BadOption(
            f"this model is a mixture of experts, and is not built for {g.target.name}: ONNX Runtime's QMoE "
            f"{g.target.no_experts}. Nearest: -e cpu."
        )

    def normed(x: Value, part: str) -> Value:
        if spec.norm is None:
            return x
        own = f"{module}.{part}"
        return norm(g, x, spec.norm, f"{at}.{part}", parameters=parameters, module=own, shape=shape)

    [logits] = linear(
        g, normed(x, "router_norm"), [f"{at}.router"],
        parameters=parameters, module=f"{module}.router", shape=shape, layer=layer,
    )  # fmt: skip
    rows = ("tokens", spec.experts)
    logits = g.op("Reshape", logits, g.integers(-1, spec.experts), shape=rows, name=path)
    if spec.router_scale != 1.0:
        logits = g.op("Mul", logits, g.number(spec.router_scale), shape=rows, name=path)
    fused = not g.target.experts_apart and spec.act == "silu" and not spec.expert_scale
    compute = _fused if fused else _apart
    y = compute(g, spec, normed(x, "expert_pre"), logits, layer=layer, parameters=parameters, shape=shape)
    y = normed(y, "expert_post")
    if spec.shared:
        shared = dense(
            g,
            GatedMLP(spec.shared, spec.act),
            normed(x, "shared_pre"),
            layer=layer,
            parameters=parameters,
            shape=shape,
            prefix="shared_",
        )
        shared = normed(shared, "shared_post")
        if spec.shared_scale:
            [scale] = linear(
                g, x, [f"{at}.shared_scale"],
                parameters=parameters, module=f"{module}.shared_scale", shape=shape, layer=layer,
            )  # fmt: skip
            one = (*shape[:-1], 1)
            scale = g.op("Sigmoid", scale, shape=one, name=path)
            shared = g.op("Mul", shared, scale, shape=shape, name=path)
        y = g.op("Add", y, shared, shape=shape, name=path)
    return y


# --- routing ------------------------------------------------------------------------------------------------


def _chosen(
    g: Builder, spec: Experts, logits: Value, path: str, offset: Value | None = None
) -> tuple[Value, Value]:
    """Return the weights of the chosen experts and which those are, [T, k] each."""
    if spec.routing == SPARSE_MIXER:
        return _sparse_mixer(g, spec, logits, path)
    if spec.routing == SIGMOID:
        return _sigmoid(g, spec, logits, offset, path)
    if spec.routing == SOFTMAX:
        logits = _softmax(g, logits, spec.experts, path)
    best, which = _largest(g, logits, spec.top_k, path)
    if spec.routing == CHOSEN_SOFTMAX:
        best = _softmax(g, best, spec.top_k, path)
    return best, which


def _sigmoid(
    g: Builder, spec: Experts, logits: Value, offset: Value | None, path: str
) -> tuple[Value, Value]:
    """Return what ``Experts.routing`` "sigmoid" chooses; see ``_chosen``."""
    rows, few = ("tokens", spec.experts), ("tokens", spec.top_k)
    weights = g.op("Sigmoid", logits, shape=rows, name=path)
    by = weights if offset is None else g.op("Add", weights, offset, shape=rows, name=path)
    _, which = _largest(g, by, spec.top_k, path)
    best = g.op("GatherElements", weights, which, shape=few, name=path, axis=1)
    if spec.summed:
        total = g.op("ReduceSum", best, g.integers(1), shape=("tokens", 1), name=path, keepdims=1)
        total = g.op("Add", total, g.number(1e-6), shape=("tokens", 1), name=path)
        best = g.op("Div", best, total, shape=few, name=path)
    if spec.factor != 1.0:
        best = g.op("Mul", best, g.number(spec.factor), shape=few, name=path)
    return best, which


def _sparse_mixer(g: Builder, spec: Experts, logits: Value, path: str) -> tuple[Value, Value]:
    """Return what ``Experts.routing`` "sparse_mixer" chooses; see ``_chosen``.

    Source: Liu et al. 2024 (GRIN MoE), https://arxiv.org/abs/2409.12136, at inference.
    """
    rows, one, pair = ("tokens", spec.experts), ("tokens", 1), ("tokens", 2)
    best, which = _largest(g, logits, 2, path)
    size = g.op("Abs", logits, shape=rows, name=path)
    never = g.number(float("-inf"))
    left, weights = logits, []
    for i in range(2):
        cut = (g.integers(i), g.integers(i + 1), g.integers(1))
        most = g.op("Slice", best, *cut, shape=one, name=path)
        index = g.op("Slice", which, *cut, shape=one, dtype="int64", name=path)
        apart = g.op("Sub", most, logits, shape=rows, name=path)
        apart = g.op("Div", apart, g.op("Max", size, most, shape=rows, name=path), shape=rows, name=path)
        far = g.op("Greater", apart, g.number(2 * spec.mixer_eps), shape=rows, dtype="bool", name=path)
        near = g.op("Where", far, never, left, shape=rows, name=path)
        near = _softmax(g, near, spec.experts, path)
        weights.append(g.op("GatherElements", near, index, shape=one, name=path, axis=1))
        if i == 0:
            none = g.op(
                "Expand",
                never,
                g.op("Shape", index, shape=(2,), dtype="int64", name=path),
                shape=one,
                name=path,
            )
            left = g.op("ScatterElements", logits, index, none, shape=rows, name=path, axis=1)
    return g.op("Concat", *weights, shape=pair, name=path, axis=1), which


def _for_operator(
    g: Builder, spec: Experts, logits: Value, path: str, offset: Value | None = None
) -> tuple[Value, Value | None]:
    """Return what MoE and QMoE take for the router's ``logits`` [T, E], and the factor [T, 1] of their result."""
    if spec.routing == CHOSEN_SOFTMAX:
        return logits, None
    weights, which = _chosen(g, spec, logits, path, offset)
    total = g.op("ReduceSum", weights, g.integers(1), shape=("tokens", 1), name=path, keepdims=1)
    if spec.routing == SOFTMAX:
        return logits, total
    # Sigmoids may all be zero, and the softmax over nothing but minus infinity is no number.
    least = g.number(1e-30 if g.dtype in ("fp32", "bf16") else 1e-7)
    weights = g.op("Max", weights, least, shape=("tokens", spec.top_k), name=path)
    logs = g.op("Log", weights, shape=("tokens", spec.top_k), name=path)
    return _scattered(g, spec, logs, which, _NEVER, path), total


def _scattered(g: Builder, spec: Experts, values: Value, which: Value, rest: float, path: str) -> Value:
    """Return [T, E] with ``values`` [T, k] at the experts ``which``, and ``rest`` elsewhere."""
    rows = ("tokens", spec.experts)
    count = g.op("Shape", which, shape=(1,), dtype="int64", name=path, start=0, end=1)
    sizes = g.op("Concat", count, g.integers(spec.experts), shape=(2,), dtype="int64", name=path, axis=0)
    empty = g.op("Expand", g.number(rest), sizes, shape=rows, name=path)
    return g.op("ScatterElements", empty, which, values, shape=rows, name=path, axis=1)


def _largest(g: Builder, logits: Value, count: int, path: str) -> tuple[Value, Value]:
    shape = ("tokens", count)
    best, which = g.ops(
        "TopK", [logits, g.integers(count)], outputs=[(g.dtype, shape), ("int64", shape)], name=path,
        attributes={"axis": 1},
    )  # fmt: skip
    return best, which


def _softmax(g: Builder, x: Value, width: int, path: str) -> Value:
    return g.op("Softmax", x, shape=("tokens", width), name=path, axis=-1)


# --- as one operator ----------------------------------------------------------------------------------------


def _fused(
    g: Builder,
    spec: Experts,
    x: Value,
    logits: Value,
    *,
    layer: int,
    parameters: Parameters,
    shape: Shape,
) -> Value:
    module = f"layers.{layer}.moe"
    path = node_path(module)
    hidden, wide, count = int(shape[-1]), spec.intermediate, spec.experts
    logits, factor = _for_operator(g, spec, logits, path, _offset(g, spec, layer, parameters))
    # The rows of gate and up take turns: that is the only layout with a kernel on CPU.
    up = _of_all(spec, layer, parameters, "gate", "up")
    down = _of_all(spec, layer, parameters, "down")
    up_bias = down_bias = None
    if spec.bias:
        up_bias = g.floats(
            _of_all(spec, layer, parameters, "gate", "up", kind="bias"),
            f"{module}.gate_up.bias",
            (count, 2 * wide),
            interleaved=2,
        )
        down_bias = g.floats(
            _of_all(spec, layer, parameters, "down", kind="bias"), f"{module}.down.bias", (count, hidden)
        )
    attributes: dict[str, int | float | str] = {
        "k": spec.top_k,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": spec.alpha,
        "activation_beta": spec.beta,
        "normalize_routing_weights": 1,
    }
    if spec.limit is not None:
        attributes["swiglu_limit"] = spec.limit
    scheme = g.scheme([*up, *down], f"{path}/QMoE", layer)
    if scheme is None:
        operator, inputs = "MoE", [
            x, logits,
            g.floats(up, f"{module}.gate_up.weight", (count, 2 * wide, hidden), interleaved=2), up_bias,
            g.floats(down, f"{module}.down.weight", (count, hidden, wide)), down_bias,
        ]  # fmt: skip
    else:
        if scheme.bits == 3 or scheme.kernel_bits not in g.target.expert_bits:
            raise BadOption(
                f"experts of {scheme.bits} bits have not been checked on {g.target.name}; allowed: "
                f"{', '.join(map(str, g.target.expert_bits))} bits. A rule for the role experts sets them."
            )
        scheme = _for_kernel(scheme, spec, hidden)
        g.need(_NARROW if scheme.bits == 2 else _QMOE)
        first = stored_codes(g, up, f"{module}.gate_up", scheme, of=spec, interleaved=2)
        second = stored_codes(g, down, f"{module}.down", scheme, of=spec)
        for name in ("gate_up", "down"):
            g.stored_for[f"{module}.{name}.codes"] = f"{path}/QMoE"
        operator, inputs = "QMoE", [
            x, logits, first.codes, first.scales, up_bias, second.codes, second.scales, down_bias,
            None, None, None, first.zeros, second.zeros,
        ]  # fmt: skip
        attributes |= {"expert_weight_bits": scheme.kernel_bits, "block_size": scheme.block}
        if g.target.query_lengths and scheme.accuracy_level == 4:
            # Twice as fast with 4 bits, which are multiplied in fp32 otherwise. Older ONNX Runtimes refuse to load
            # it, so only the graph that is for new ones has it.
            attributes["accuracy_level"] = 4
            g.need(_LEVEL)
    [y] = g.ops(
        operator, inputs, outputs=[(g.dtype, shape)], name=path, domain=MICROSOFT, attributes=attributes
    )
    if factor is None:
        return y
    sizes = g.op("Shape", x, shape=(2,), dtype="int64", name=path, start=0, end=2)
    sizes = g.op("Concat", sizes, g.integers(1), shape=(3,), dtype="int64", name=path, axis=0)
    factor = g.op("Reshape", factor, sizes, shape=(*shape[:-1], 1), name=path)
    return g.op("Mul", y, factor, shape=shape, name=path)


def _of_all(
    spec: Experts, layer: int, parameters: Parameters, *parts: str, kind: str = "weight"
) -> list[Parameter]:
    """Return the weights ``parts`` of all experts, the first part of each before the second of each."""
    return [
        parameters[f"layers.{layer}.expert_{part}.{e}.{kind}"] for part in parts for e in range(spec.experts)
    ]


def _offset(g: Builder, spec: Experts, layer: int, parameters: Parameters) -> Value | None:
    return g.weight(parameters[f"layers.{layer}.offset.weight"]) if spec.offset else None


def _for_kernel(scheme: Scheme, spec: Experts, hidden: int) -> Scheme:
    """Return ``scheme`` with the largest block that the kernel can take; raises UnsupportedModel if none is."""
    blocks = [b for b in BLOCKS if b <= scheme.block and hidden % b == 0 and spec.intermediate % b == 0]
    if not scheme.symmetric:
        # ONNX Runtime 1.24 passes over the zeros of rows that are a single block.
        blocks = [b for b in blocks if b < min(hidden, spec.intermediate)]
    if not blocks:
        raise UnsupportedModel(
            f"experts of {spec.intermediate} channels in a model of {hidden} cannot be quantized: QMoE wants "
            f"blocks of {BLOCKS[0]} or more that divide both, with zero points at least two in a row. Build with "
            "-p fp32."
        )
    if max(blocks) == scheme.block:
        return scheme
    # What the checkpoint holds in other blocks cannot be carried over.
    algorithm = "rtn" if scheme.algorithm == KEPT else scheme.algorithm
    return replace(scheme, block=max(blocks), algorithm=algorithm)


# --- one after the other ------------------------------------------------------------------------------------


def _apart(
    g: Builder,
    spec: Experts,
    x: Value,
    logits: Value,
    *,
    layer: int,
    parameters: Parameters,
    shape: Shape,
) -> Value:
    """Compute each expert on the tokens that chose it, with products of its own.

    Tokens are sorted by expert, so that an expert without any costs two empty products and nothing else.
    """
    at, module = f"layers.{layer}", f"layers.{layer}.moe"
    path, hidden, wide = node_path(module), int(shape[-1]), spec.intermediate
    few, rows, turned = ("tokens", spec.top_k), ("tokens", spec.experts), (spec.experts, "tokens")
    pairs = f"pairs_{layer}"
    weights, which = _chosen(g, spec, logits, path, _offset(g, spec, layer, parameters))
    if spec.expert_scale:
        scale = g.weight(parameters[f"{at}.expert_scale.weight"])
        scale = g.op("Gather", scale, which, shape=few, name=path, axis=0)
        weights = g.op("Mul", weights, scale, shape=few, name=path)
    sizes = g.op("Shape", which, shape=(2,), dtype="int64", name=path)
    ones = g.op("Expand", g.number(1.0), sizes, shape=few, name=path)
    mine = g.cast(_scattered(g, spec, ones, which, 0.0, path), "int64", rows, path)
    mine = g.op("Transpose", mine, shape=turned, dtype="int64", name=path, perm=(1, 0))
    counts = g.op(
        "ReduceSum", mine, g.integers(1), shape=(spec.experts,), dtype="int64", name=path, keepdims=0
    )
    both = g.op("NonZero", mine, shape=(2, pairs), dtype="int64", name=path)
    token = g.op("Gather", both, g.integer(1), shape=(pairs,), dtype="int64", name=path, axis=0)
    flat = g.op("Reshape", x, g.integers(-1, hidden), shape=("tokens", hidden), name=path)
    flat = g.op("Gather", flat, token, shape=(pairs, hidden), name=path, axis=0)

    scheme = g.scheme(_of_all(spec, layer, parameters, "gate", "up", "down"), f"{path}/experts/MatMul", layer)

    def each(x: Value, parts: Sequence[str], inputs: int, out: int) -> Value:
        counted = [(g.dtype, (f"tokens_{layer}_{e}", inputs)) for e in range(spec.experts)]
        given = g.ops("Split", [x, counts], outputs=counted, name=path, attributes={"axis": 0})
        made = [
            _product(
                g, spec, given[e], [f"{at}.expert_{part}.{e}" for part in parts], scheme,
                parameters=parameters, shape=(f"tokens_{layer}_{e}", out), path=path,
            )
            for e in range(spec.experts)
        ]  # fmt: skip
        return g.op("Concat", *made, shape=(pairs, out), name=path, axis=0)

    y = each(flat, ("gate", "up"), hidden, 2 * wide)
    gate, up = g.ops(
        "Split", [y, g.integers(wide, wide)], outputs=[(g.dtype, (pairs, wide))] * 2, name=path,
        attributes={"axis": -1},
    )  # fmt: skip
    y = each(_activated(g, spec, gate, up, (pairs, wide), path), ("down",), wide, hidden)

    # Where the pair of each token and expert lies.
    place = g.op("Reshape", mine, g.integers(-1), shape=("all",), dtype="int64", name=path)
    place = g.op("CumSum", place, g.integer(0), shape=("all",), dtype="int64", name=path)
    place = g.op("Sub", place, g.integer(1), shape=("all",), dtype="int64", name=path)
    lead = g.op("Shape", mine, shape=(2,), dtype="int64", name=path)
    place = g.op("Reshape", place, lead, shape=turned, dtype="int64", name=path)
    place = g.op("Transpose", place, shape=rows, dtype="int64", name=path, perm=(1, 0))
    place = g.op("GatherElements", place, which, shape=few, dtype="int64", name=path, axis=1)
    y = g.op("Gather", y, place, shape=(*few, hidden), name=path, axis=0)
    weights = g.op("Unsqueeze", weights, g.integers(-1), shape=(*few, 1), name=path)
    y = g.op("Mul", y, weights, shape=(*few, hidden), name=path)
    y = g.op("ReduceSum", y, g.integers(1), shape=("tokens", hidden), name=path, keepdims=0)
    lead = g.op("Shape", x, shape=(len(shape),), dtype="int64", name=path)
    return g.op("Reshape", y, lead, shape=shape, name=path)


def _product(
    g: Builder,
    spec: Experts,
    x: Value,
    names: Sequence[str],
    scheme: Scheme | None,
    *,
    parameters: Parameters,
    shape: Shape,
    path: str,
) -> Value:
    """Return one expert's product with the matrices ``names``, one below the other."""
    weights = [parameters[f"{name}.weight"] for name in names]
    module, own = f"{names[0]}.weights", f"{path}/{names[0].split('.', 2)[2]}"
    if scheme is None:
        y = g.product(x, weights, module, shape=shape, path=own)
    else:
        share = spec.top_k / spec.experts
        matrix = stored_codes(g, weights, module, scheme, share=share)
        g.stored_for[f"{module}.codes"] = f"{path}/experts/MatMul"
        inputs = weights[0].shape[1]
        y = matmul_nbits(g, x, matrix, scheme=scheme, inputs=inputs, out=shape, path=own)
        g.annotate(SHARE, f"{share!r}")
    if f"{names[0]}.bias" in parameters:
        biases = g.vector([parameters[f"{n}.bias"] for n in names], f"{names[0]}.biases")
        y = g.op("Add", y, biases, shape=shape, name=own)
    return y


def _activated(g: Builder, spec: Experts, gate: Value, up: Value, shape: Shape, path: str) -> Value:
    """Return what ``Experts`` says of gate and up."""
    if spec.act != "silu":
        gate = activate(g, gate, spec.act, shape=shape, path=path)
        return g.op("Mul", gate, up, shape=shape, name=path)
    if spec.limit is not None:
        most, least = g.number(spec.limit), g.number(-spec.limit)
        gate = g.op("Min", gate, most, shape=shape, name=path)
        up = g.op("Max", g.op("Min", up, most, shape=shape, name=path), least, shape=shape, name=path)
    if spec.beta:
        up = g.op("Add", up, g.number(spec.beta), shape=shape, name=path)
    inner = g.op("Mul", gate, g.number(spec.alpha), shape=shape, name=path) if spec.alpha != 1.0 else gate
    gate = g.op("Mul", gate, g.op("Sigmoid", inner, shape=shape, name=path), shape=shape, name=path)
    return g.op("Mul", gate, up, shape=shape, name=path)
