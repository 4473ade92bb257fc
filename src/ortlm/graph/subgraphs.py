"""A graph cut at its products, so that each can be looked at, and changed, before it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from ortlm.graph.altup import gathered
from ortlm.graph.attention import KeyValue, SharedKeyValue
from ortlm.graph.builder import IR_VERSION, MICROSOFT, OPSET, Builder, Product
from ortlm.graph.decoder import emit_layer, logits_of
from ortlm.graph.linear import Parameters, Vocabulary
from ortlm.graph.norm import Residual
from ortlm.graph.states import past_states
from ortlm.graph.step import Step
from ortlm.graph.weight_plan import Plain
from ortlm.quant.recipe import Uniform
from ortlm.spec import Attention, Decoder, parameters
from ortlm.target import HERE

# Names of what goes into the first piece of a layer and comes out of the last one.
HIDDEN, MASK, PER_LAYER, RESULT = "hidden", "attention_mask", "per_layer_input", "result"
_FLOAT = Uniform(None, None, None)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive operators of a graph, from one product (the first of them) up to the next.

    ``inputs`` are values of earlier pieces or of the graph, ``weights`` what has to be fed: the plan's items, but
    matrices [out, in] as they are, since transposing them takes as long as reading them. ``outputs`` is what later
    pieces need, or the graph's result. ``product`` is None for what stands before all. ``result`` names what the
    product gives if it is not computed here, but among ``inputs``.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    weights: tuple[Plain, ...]
    outputs: tuple[str, ...]
    product: Product | None
    result: str | None = None


def carried(spec: Decoder, index: int) -> tuple[int, ...]:
    """Return whose keys and values go into layer ``index`` next to the residual stream, for it or later layers."""
    later = {
        layer.mixer.shared
        for layer in spec.layers[index:]
        if isinstance(layer.mixer, Attention) and layer.mixer.shared is not None
    }
    return tuple(sorted(number for number in later if number < index))


def cache_layer(spec: Decoder, index: int) -> int:
    """Return the layer whose states layer ``index`` has: itself, or the one whose keys and values it shares."""
    mixer = spec.layers[index].mixer
    shared = mixer.shared if isinstance(mixer, Attention) else None
    return index if shared is None else shared


def layer_pieces(spec: Decoder, index: int, *, apart: bool = False) -> list[Piece]:
    """Return layer ``index`` of ``spec`` in fp32, in pieces; with ``apart`` without their products.

    Those of experts, which each see some of the tokens, stay.

    In go ``hidden`` float32 [B, S, H], the residual stream, or several of them one after the other,
    ``attention_mask`` int64 [B, S] and empty states (keys and values [B, K, 0, D], or zeros of what has one size).
    Out comes ``result``: what goes into the next layer, or into the final norm. Where layers
    share keys and values, those that are ``carried`` follow the stream's channels, [B, S, K · D] each. With
    ``PerLayerInputs`` the layer's vectors go in too, ``per_layer_input`` [B, S, width].
    """
    g, weights = _builder(spec)
    lead = ("batch_size", "sequence_length")
    shape = (*lead, spec.streams * spec.hidden)
    before, after = carried(spec, index), carried(spec, index + 1)
    x = g.input(HIDDEN, "fp32", (*lead, shape[-1] + sum(2 * _narrow(spec, i) for i in before)))
    mask = g.input(MASK, "int64", ("batch_size", "total_sequence_length"))
    inputs = spec.per_layer_inputs
    per_layer = None if inputs is None else g.input(PER_LAYER, "fp32", (*lead, inputs.width))
    source = cache_layer(spec, index)
    past = past_states(g, source, spec.layers[source].mixer, "fp32")
    step = Step(g, x, mask, None, all_logits=True)
    shared_kv: dict[int, SharedKeyValue] = {}
    if before:
        sizes = [spec.streams * spec.hidden, *(_narrow(spec, i) for i in before for _ in "kv")]
        x, *parts = g.ops(
            "Split", [x, g.integers(*sizes)],
            outputs=[("fp32", (*lead, size)) for size in sizes], name="/model/carried", attributes={"axis": -1},
        )  # fmt: skip
        for i, key, value in zip(before, parts[::2], parts[1::2], strict=True):
            # Of the others, which are handed on, there is no past.
            cache = KeyValue(*(past if i == source else (key, value)))
            shared_kv[i] = SharedKeyValue(cache, KeyValue(key, value), cache)
    stream = Residual(g, x, shape, weights)
    emit_layer(
        g, spec, stream, past if source == index else (), index=index, step=step, weights=weights,
        shared_kv=shared_kv, per_layer=per_layer,
    )  # fmt: skip
    new = [shared_kv[i].new for i in after]
    rest = [part for pair in new if pair is not None for part in (pair.key, pair.value)]
    total, wide = stream.total(f"layers.{index}"), spec.streams * spec.hidden
    if index == len(spec.layers) - 1:
        total, wide = gathered(g, spec, total, weights, lead), spec.hidden
    out = (*lead, wide + sum(2 * _narrow(spec, i) for i in after))
    result = (
        g.op("Concat", total, *rest, shape=out, name="/model/result", axis=-1)
        if rest
        else g.op("Identity", total, shape=out, name="/model/result")
    )
    g.output(result, RESULT, out)
    products = [p for p in g.products if all(weights[name].expert is None for name in p.parameters)]
    return cut(g, products if apart else ())


def _narrow(spec: Decoder, index: int) -> int:
    """Return how many channels the keys of layer ``index`` have."""
    mixer = spec.layers[index].mixer
    assert isinstance(mixer, Attention)
    return mixer.kv_heads * mixer.head_dim


def head_pieces(spec: Decoder, rows: int) -> list[Piece]:
    """Return the final norm and the first ``rows`` rows of the head in fp32, in pieces; see ``layer_pieces``.

    The head's weights are those called ``head.weight`` and ``head.bias``, also if it is tied.
    """
    # The result of a slice of the head is that slice of the logits: what follows it works on each alone.
    part = replace(spec, vocab=rows, tied_head=False)
    g, weights = _builder(part)
    shape = ("batch_size", "sequence_length", spec.hidden)
    stream = Residual(g, g.input(HIDDEN, "fp32", shape), shape, weights)
    x = stream.normed(spec.final_norm, "final_norm", module="layers.norm")
    logits = logits_of(g, part, Vocabulary(g, part, weights), x, shape)
    out = (*shape[:-1], rows)
    g.output(g.op("Identity", logits, shape=out, name="/lm_head/result"), RESULT, out)
    return cut(g)


def _builder(spec: Decoder) -> tuple[Builder, Parameters]:
    g = Builder(target=HERE, dtype="fp32", recipe=_FLOAT, layers=len(spec.layers))
    return g, {p.name: p for p in parameters(spec)}


def cut(g: Builder, apart: Sequence[Product] = ()) -> list[Piece]:
    """Return the graph of ``g`` in pieces, each a model of its own; all its weights become inputs.

    Of products in ``apart``, the pieces are given the results.
    """
    items = {item.tensors[0].name: item for item in g.plan.items if isinstance(item, Plain)}
    starts = [0, *(p.node for p in g.products)]
    stops = [*starts[1:], len(g.nodes)]
    products: list[Product | None] = [None, *g.products]
    ends = [str(value.name) for value in g.outputs]
    pieces = []
    for start, stop, product in zip(starts, stops, products, strict=True):
        later = {str(v.name) for node in g.nodes[stop:] for v in node.inputs if v is not None}
        wanted, result = {*later, *ends}, None
        if product is not None and product in apart:
            result, start = str(g.nodes[start].outputs[0].name), start + 1
        piece = _piece(g, g.nodes[start:stop], wanted, items, product)
        pieces.append(replace(piece, result=result))
    return pieces


def _piece(
    g: Builder, nodes: Sequence[ir.Node], wanted: set[str], items: dict[str, Plain], product: Product | None
) -> Piece:
    """Return copies of ``nodes`` as a model that gives those of their results that are ``wanted``."""
    values: dict[str, ir.Value] = {}
    inputs: list[ir.Value] = []
    constants: list[ir.Value] = []

    def inner(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        name = str(value.name)
        if name not in values:
            values[name] = _copy(value)
            if value.const_value is not None:
                values[name].const_value = value.const_value
                constants.append(values[name])
            else:
                inputs.append(values[name])
        return values[name]

    by_rows = {name for name in items if items[name].transposed and _is_only_a_second_factor(name, nodes)}

    copies = []
    for node in nodes:
        given = [inner(value) for value in node.inputs]
        made = [_copy(value) for value in node.outputs]
        values.update((str(value.name), value) for value in made if value.name)
        domain, kind, attributes = node.domain, node.op_type, list(node.attributes.values())
        if kind == "MatMul" and by_rows & {str(value.name) for value in given if value is not None}:
            domain, kind, attributes = MICROSOFT, "FusedMatMul", [ir.AttrInt64("transB", 1)]
        copies.append(ir.Node(domain, kind, given, attributes, outputs=made, name=node.name))
    for name in by_rows & values.keys():
        values[name].shape = ir.Shape(reversed(items[name].tensor.shape))
        tensor = replace(items[name].tensor, shape=items[name].tensor.shape[::-1])
        items = {**items, name: replace(items[name], tensor=tensor, transposed=False)}
    outputs = [values[str(v.name)] for node in nodes for v in node.outputs if v.name in wanted]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=copies,
        initializers=constants,
        opset_imports={"": OPSET, MICROSOFT: 1},
        name="piece",
    )
    names = [str(value.name) for value in inputs]
    return Piece(
        ir.Model(graph, ir_version=IR_VERSION, producer_name="ortlm"),
        tuple(name for name in names if name not in items),
        tuple(items[name] for name in names if name in items),
        tuple(str(value.name) for value in outputs),
        product,
    )


def _is_only_a_second_factor(name: str, nodes: Sequence[ir.Node]) -> bool:
    """Return whether ``nodes`` use the value ``name`` to multiply by, and for nothing else."""
    uses = [
        (node.op_type, at)
        for node in nodes
        for at, value in enumerate(node.inputs)
        if value is not None and value.name == name
    ]
    return bool(uses) and set(uses) == {("MatMul", 1)}


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type)
