"""The whole decoder: embeddings, layers, head, and the contract of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ortlm.graph.altup import Streams, gathered, spread
from ortlm.graph.attention import CacheScales, KeyValue, SharedKeyValue, attention
from ortlm.graph.builder import Builder, Shape, Value
from ortlm.graph.delta_net import delta_net
from ortlm.graph.laurel import laurel
from ortlm.graph.linear import Parameters, Vocabulary, linear, node_path
from ortlm.graph.mamba import mamba
from ortlm.graph.mlp import dense
from ortlm.graph.moe import mixture
from ortlm.graph.norm import Residual, Selection, norm
from ortlm.graph.per_layer_inputs import per_layer_branch, per_layer_inputs
from ortlm.graph.rope import RopeTables
from ortlm.graph.short_conv import short_conv
from ortlm.graph.states import past_states, present_states
from ortlm.graph.step import Step
from ortlm.quant.recipe import Recipe
from ortlm.spec import Decoder, DeltaNet, Experts, Mamba2, ShortConv, parameters
from ortlm.target import Target


@dataclass(frozen=True, slots=True)
class Emitted:
    """A finished graph and what its tensors are for (role to name)."""

    builder: Builder
    inputs: dict[str, str]
    outputs: dict[str, str]
    optional: dict[str, str]


def emit_decoder(
    spec: Decoder,
    *,
    target: Target,
    dtype: str,
    recipe: Recipe,
    all_logits: bool = False,
    hidden_states: bool = False,
    adapted: frozenset[str] = frozenset(),
    cache_scales: Sequence[CacheScales] | None = None,
    embedded: bool = False,
    mutual: bool = False,
    fast_prompts: bool = False,
    integer_only: bool = False,
) -> Emitted:
    """Return the graph of ``spec`` for ``target`` with activations and cache of element type ``dtype``.

    Inputs: ``input_ids`` int64 [B, S], or ``inputs_embeds`` [B, S, H] if they are ``embedded`` by another graph;
    ``attention_mask`` int64 [B, T], ``position_ids`` int64 [B, S] where the target rotates outside attention, or
    [3, B, S] where tokens have three positions, and ``past_key_values.{i}.key|value`` [B, K, past, D].
    Outputs: ``logits`` [B, 1, V] of each row's last token ([B, S, V] with ``all_logits``) and
    ``present.{i}.key|value`` [B, K, total, D]; with ``hidden_states`` also the final norm's output [B, S, H].
    Layers without keys and values have other states, see ``spec.mixer_states``.
    With ``cache_scales``, one for each layer that has keys and values of its own, the cache is int8 instead.
    With ``fast_prompts`` each quantized matrix is stored a second time, for prompts; with ``integer_only`` in that
    form only.
    With ``mutual``, tokens of an image attend to each other both ways, see Step.same_image.
    The weights that ``adapted`` names get optional inputs for LoRA adapters, listed in ``builder.plan.low_rank``.
    """
    g = Builder(
        target=target,
        dtype=dtype,
        recipe=recipe,
        layers=len(spec.layers),
        fast_prompts=fast_prompts,
        integer_only=integer_only,
        adapted=adapted,
    )
    weights: Parameters = {p.name: p for p in parameters(spec)}
    lead: tuple[int | str, ...] = ("batch_size", "sequence_length")
    shape = (*lead, spec.hidden)
    ids = g.input("inputs_embeds", dtype, shape) if embedded else g.input("input_ids", "int64", lead)
    mask = g.input("attention_mask", "int64", ("batch_size", "total_sequence_length"))
    inputs = {str(ids.name): str(ids.name), "attention_mask": "attention_mask"}
    positions = axes = None
    if any(mixer.rope is not None and mixer.rope.axes is not None for mixer in spec.attentions):
        axes = g.input("position_ids", "int64", (3, *lead))
        inputs["position_ids"] = "position_ids"
    elif not target.rotary_inside:
        positions = g.input("position_ids", "int64", lead)
        inputs["position_ids"] = "position_ids"
    kind = dtype if cache_scales is None else "int8"
    pasts = [past_states(g, i, layer.mixer, kind) for i, layer in enumerate(spec.layers)]
    step = Step(g, ids, mask, positions, all_logits=all_logits, mutual=mutual, axes=axes)
    if fast_prompts:
        g.many = step.many()
    select = step.selection()
    tables = RopeTables(g, spec.max_tokens)
    vocabulary = Vocabulary(g, spec, weights, embed=not embedded)

    if not embedded:
        ids = step.compact(ids)
    x = ids if embedded else embeddings(g, spec, vocabulary, ids, shape)
    assert not embedded or spec.per_layer_inputs is None, "embeddings do not say which tokens they are of"
    per_layer = per_layer_inputs(g, spec, ids, x, weights)
    x = spread(g, spec, x, weights, shape)
    stream = Residual(g, x, (*lead, spec.streams * spec.hidden), weights)
    scales = {i: one for (i, _), one in zip(spec.cached, cache_scales or (), strict=False)}
    shared_kv: dict[int, SharedKeyValue] = {}
    presents = []
    for i in range(len(spec.layers)):
        # Only the last layer's queries are wanted of the last positions; its keys and values of all.
        last = select if i == len(spec.layers) - 1 and not hidden_states else None
        presents.append(
            emit_layer(
                g,
                spec,
                stream,
                pasts[i],
                index=i,
                step=step,
                tables=tables,
                weights=weights,
                last=last,
                scales=scales,
                shared_kv=shared_kv,
                per_layer=per_layer[i] if per_layer else None,
            )
        )
    if spec.altup is not None:
        x = gathered(g, spec, stream.total("altup"), weights, stream.shape[:-1])
        stream = Residual(g, x, (*stream.shape[:-1], spec.hidden), weights)
    x = stream.normed(spec.final_norm, "final_norm", module="layers.norm")
    shape = (*stream.shape,)
    outputs = {}
    if hidden_states:
        every = g.op("Identity", x, shape=shape, name="/model/hidden_states")
        g.output(every, "hidden_states", shape)
        outputs["hidden_states"] = "hidden_states"
        if select is not None:
            x = select(x, spec.hidden, "/lm_head")
            shape = (*select.lead, spec.hidden)
    logits = logits_of(g, spec, vocabulary, x, shape)
    # onnxruntime-genai allocates [B, S, V] unless it reads a static 1 here.
    # Who says how many logits are wanted gets what the graph gives.
    rows = "sequence_length" if all_logits else "kept" if target.left_padding else 1
    g.output(logits, "logits", ("batch_size", rows, spec.vocab))
    outputs["logits"] = "logits"
    for i, (layer, present) in enumerate(zip(spec.layers, presents, strict=True)):
        present_states(g, i, layer.mixer, present)
    return Emitted(g, inputs, outputs, step.optional)


def embeddings(g: Builder, spec: Decoder, vocabulary: Vocabulary, ids: Value, shape: Shape) -> Value:
    """Return what the first layer reads for token ``ids`` int64 [B, S]."""
    x = vocabulary.embed(ids, shape)
    if spec.embed_scale != 1.0:
        x = g.op("Mul", x, g.number(spec.embed_scale), shape=shape, name="/model/embed_tokens")
    return x


def emit_layer(
    g: Builder,
    decoder: Decoder,
    stream: Residual,
    past: Sequence[Value],
    *,
    index: int,
    step: Step,
    weights: Parameters,
    tables: RopeTables | None = None,
    last: Selection | None = None,
    scales: Mapping[int, CacheScales] | None = None,
    shared_kv: dict[int, SharedKeyValue] | None = None,
    per_layer: Value | None = None,
) -> tuple[Value, ...]:
    """Emit layer ``index`` of ``decoder`` onto ``stream``, from the states ``past``, and return its states.

    ``last`` drops the positions that nothing after it needs; ``tables`` are shared by layers. ``scales`` are by
    layer. ``shared_kv`` has the keys and values of earlier layers, which this one may share, and gets its own.
    ``per_layer`` [B, S, width] are the layer's vectors of ``PerLayerInputs``.
    """
    at, module = f"layers.{index}", f"layers.{index}"
    spec, hidden = decoder.layers[index], decoder.hidden
    around, streams = stream, None
    if decoder.altup is not None:
        shape = (*stream.shape[:-1], hidden)
        streams = Streams(g, decoder.altup, stream.total(module), shape, weights, index)
        stream = streams.inner
    tables = tables or RopeTables(g, decoder.max_tokens)
    mixer = spec.mixer
    x = stream.normed(spec.mixer_pre, f"{at}.mixer_pre", module=f"{module}.input_layernorm")
    present: tuple[Value, ...]
    if isinstance(mixer, ShortConv):
        y, *kept = short_conv(g, mixer, x, *past, layer=index, step=step, parameters=weights, hidden=hidden)
        present, own = tuple(kept), "conv"
    elif isinstance(mixer, DeltaNet):
        y, *kept = delta_net(g, mixer, x, *past, layer=index, step=step, parameters=weights, hidden=hidden)
        present, own = tuple(kept), "linear_attn"
    elif isinstance(mixer, Mamba2):
        y, *kept = mamba(g, mixer, x, *past, layer=index, step=step, parameters=weights, hidden=hidden)
        present, own = tuple(kept), "mamba"
    else:
        source = index if mixer.shared is None else mixer.shared
        shared_kv = {} if shared_kv is None else shared_kv
        y, cache = attention(
            g, mixer, x, KeyValue(*past) if past else None,
            layer=index, step=step, tables=tables, parameters=weights, hidden=hidden,
            scales=(scales or {}).get(source), shares=index in decoder.sharing, shared=shared_kv.get(source),
        )  # fmt: skip
        if mixer.shared is None:
            shared_kv[index] = cache
        present = (cache.present.key, cache.present.value) if mixer.shared is None else ()
        own = "attn"
    wide = mixer.width
    if last is not None:
        path = node_path(module)
        y = last(y, wide, f"{path}/{own}")
        if spec.parallel or spec.laurel is not None:
            x = last(x, hidden, path)
        stream.keep(last, module)
        if per_layer is not None and decoder.per_layer_inputs is not None:
            per_layer = last(per_layer, decoder.per_layer_inputs.width, f"{path}/per_layer_input")
    lead = stream.shape[:-1]
    [y] = linear(
        g,
        y,
        [f"{at}.o"],
        parameters=weights,
        module=f"{module}.{own}.o_proj",
        shape=(*lead, wide),
        layer=index,
    )
    if spec.mixer_post is not None:
        y = norm(
            g, y, spec.mixer_post, f"{at}.mixer_post",
            parameters=weights, module=f"{module}.post_attention_layernorm", shape=stream.shape,
        )  # fmt: skip
    stream.add(y, scale=spec.residual_scale, module=module)
    if spec.laurel is not None:
        y = laurel(g, spec.laurel, x, layer=index, parameters=weights, shape=stream.shape)
        stream.add(y, scale=1.0, module=module)
        stream.multiply(g.number(2**-0.5), module)
    if not spec.parallel:
        x = stream.normed(spec.ffn_pre, f"{at}.ffn_pre", module=f"{module}.pre_feedforward_layernorm")
    if isinstance(spec.ffn, Experts):
        y = mixture(g, spec.ffn, x, layer=index, parameters=weights, shape=stream.shape)
    else:
        y = dense(g, spec.ffn, x, layer=index, parameters=weights, shape=stream.shape)
    if spec.ffn_post is not None:
        y = norm(
            g, y, spec.ffn_post, f"{at}.ffn_post",
            parameters=weights, module=f"{module}.post_feedforward_layernorm", shape=stream.shape,
        )  # fmt: skip
    stream.add(y, scale=spec.residual_scale, module=module)
    # Where there are several streams, all of them are given that.
    inputs = decoder.per_layer_inputs if streams is None else None
    if spec.per_layer_post is not None and inputs is not None and per_layer is not None:
        y = per_layer_branch(
            g, inputs, stream.total(module), per_layer, spec.per_layer_post,
            layer=index, parameters=weights, shape=stream.shape,
        )  # fmt: skip
        stream.add(y, scale=1.0, module=module)
    if spec.scaled:
        stream.multiply(g.weight(weights[f"{at}.scale.weight"]), module)
    if streams is not None:
        _leave(g, decoder, around, streams, per_layer, index=index, weights=weights, last=last)
    return present


def _leave(
    g: Builder,
    decoder: Decoder,
    stream: Residual,
    streams: Streams,
    per_layer: Value | None,
    *,
    index: int,
    weights: Parameters,
    last: Selection | None,
) -> None:
    """Put all ``streams``, corrected by what layer ``index`` has computed, back onto ``stream``.

    ``last`` has been done to all but what the layer does not see.
    """
    spec, module = decoder.layers[index], f"layers.{index}"
    if last is not None:
        streams.keep(last)
    x = streams.inner.total(module)
    streams.corrected(x)
    if spec.per_layer_post is not None and decoder.per_layer_inputs is not None and per_layer is not None:
        y = per_layer_branch(
            g, decoder.per_layer_inputs, streams.scaled(), per_layer, spec.per_layer_post,
            layer=index, parameters=weights, shape=streams.inner.shape,
        )  # fmt: skip
        streams.add(y)
    stream.replace(streams.total(), (*streams.inner.shape[:-1], decoder.streams * decoder.hidden))


def logits_of(
    g: Builder, spec: Decoder, vocabulary: Vocabulary, x: Value, shape: tuple[int | str, ...]
) -> Value:
    """Return the logits of normalized hidden states ``x``."""
    path = "/lm_head"
    out = (*shape[:-1], spec.vocab)
    scale = g.number(spec.logit_scale) if spec.logit_scale != 1.0 else None
    if scale is not None and not spec.head_bias:
        # Scaling the narrow side is cheaper than scaling the logits, and the same.
        x = g.op("Mul", x, scale, shape=shape, name=path)
    y = vocabulary.head(x, shape)
    if scale is not None and spec.head_bias:
        y = g.op("Mul", y, scale, shape=out, name=path)
    if spec.logit_softcap:
        y = g.op("Div", y, g.number(spec.logit_softcap), shape=out, name=path)
        y = g.op("Tanh", y, shape=out, name=path)
        y = g.op("Mul", y, g.number(spec.logit_softcap), shape=out, name=path)
    if g.dtype == "bf16":
        # onnxruntime-genai reads logits as fp32 or fp16.
        y = g.cast(y, "fp32", out, path)
    return y
