"""Gemma 4, text: larger heads in full attention, shared keys and values, per-layer embeddings, or experts.

E2B and E4B share keys and values and have per-layer embeddings. Next to the MLP of each layer of 26B-A4B there are
experts; each of both has norms of its own. 31B has none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, SLIDING, WithDefaults
from ortlm.architectures._parts import (
    MOST_EXPERTS,
    MOST_WIDE,
    SANDWICH,
    Sizes,
    architecture,
    attention,
    decoder_of,
    sizes,
    stacked_experts,
)
from ortlm.architectures._per_layer import (
    PER_LAYER_NAMES,
    kv_sources,
    per_layer_inputs,
    per_layer_sources,
    unused,
)
from ortlm.architectures._rope import KINDS, from_parts
from ortlm.architectures._text_part import text_only, text_part
from ortlm.spec import Architecture, Attention, Experts, GatedMLP, Layer, Norm, Rope, Source

MODEL_TYPES = ("gemma4_text", "gemma4")

# What the rotation is where config.json does not say it.
_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}

# Where experts and the MLP next to them are, and what is no module with a weight.
_NAMES = {
    "shared_pre": "pre_feedforward_layernorm",
    "shared_post": "post_feedforward_layernorm_1",
    "expert_pre": "pre_feedforward_layernorm_2",
    "expert_post": "post_feedforward_layernorm_2",
    "shared_gate": "mlp.gate_proj",
    "shared_up": "mlp.up_proj",
    "shared_down": "mlp.down_proj",
    "router": "router.proj",
    "router_norm": "",
    "expert_scale": "",
}
_TABLES = {"router_norm": "router.scale", "expert_scale": "router.per_expert_scale"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Gemma 4."""
    if config["model_type"] == "gemma4":
        inner, tied = text_part(config, tied=True)
        return text_only(
            describe(WithDefaults(inner.values, {}, fixed={**tied, "model_type": "gemma4_text"}))
        )
    c = Config(config)
    _check(c)
    s = sizes(c, head_dim=256, kv_heads=4)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    kinds = c.layer_types(s.layers, windowed=True) or [
        SLIDING if (i + 1) % 6 else FULL for i in range(s.layers)
    ]
    kinds[-1] = FULL  # as in transformers, whatever the file says
    large = _large(c, s, kinds)
    same = c.flag("attention_k_eq_v", False)
    window = c.window(s.max_tokens, default=512)
    mixers = {
        FULL: replace(_attention(c, large, norm, FULL), values_are_keys=same),
        SLIDING: replace(_attention(c, s, norm, SLIDING), window=window),
    }
    act = c.activation("hidden_activation", "gelu_pytorch_tanh")
    several = c.flag("enable_moe_block", False)
    dense = GatedMLP(s.intermediate, act)
    inputs = per_layer_inputs(c, s, norm, act)
    if inputs is None:
        # transformers fails at the combination, so that nothing says what it means.
        c.refuse("num_kv_shared_layers", 'it goes with "hidden_size_per_layer_input" above 0 only')
    elif several:
        raise c.unsupported("enable_moe_block", 'it goes with "hidden_size_per_layer_input" 0 only')
    layer = Layer(
        mixers[FULL],
        _experts(c, s, norm, act) if several else dense,
        norm,
        None if several else norm,
        mixer_post=norm,
        ffn_post=norm,
        scaled=True,
        per_layer_post=norm if inputs is not None else None,
    )
    double = 1 + c.flag("use_double_wide_mlp", False)
    layers = [
        replace(layer, mixer=mixers[kind])
        if lender is None
        else replace(
            layer,
            mixer=replace(mixers[kind], shared=lender),
            ffn=replace(dense, intermediate=double * s.intermediate),
        )
        for kind, lender in zip(kinds, kv_sources(c, kinds, absent=0), strict=True)
    ]
    decoder = decoder_of(
        c,
        s,
        tuple(layers),
        norm,
        tied=True,
        embed_scale=s.hidden**0.5,
        logit_softcap=c.positive_or_none("final_logit_softcapping") or 0.0,
        per_layer_inputs=inputs,
    )
    scales = {f"layers.{i}.scale.weight": Source(f"model.layers.{i}.layer_scalar") for i in range(s.layers)}
    tables = {
        f"layers.{i}.{part}.weight": Source(f"model.layers.{i}.{tensor}")
        for i in range(s.layers)
        for part, tensor in _TABLES.items()
        if several
    }
    sources = scales | tables | stacked_experts(decoder, "experts") | per_layer_sources(decoder)
    names = {**SANDWICH, **(_NAMES if several else {}), **PER_LAYER_NAMES, "scale": ""}
    return unused(architecture(decoder, "gemma4_text", names=names, fused=sources))


def _experts(c: Config, s: Sizes, norm: Norm, act: str) -> Experts:
    """Return the experts of 26B-A4B, and the MLP next to them."""
    count, chosen = (c.integer(key, most=MOST_EXPERTS) for key in ("num_experts", "top_k_experts"))
    if chosen > count:
        raise c.wrong("top_k_experts", f'at most "num_experts" ({count})')
    return Experts(
        count,
        chosen,
        c.integer("moe_intermediate_size", most=MOST_WIDE),
        act=act,
        expert_scale=True,
        norm=norm,
        router_scale=s.hidden**-0.5,
        shared=s.intermediate,
    )


def _check(c: Config) -> None:
    """Refuse by name what cannot be built."""
    if not c.has("sliding_window", 512):
        raise c.wrong("sliding_window", "a number of tokens, for the layers that have a window")
    # "vision" is for the tokens of images, of which there are none.
    if c.values.get("use_bidirectional_attention") not in (None, "vision"):
        raise c.unsupported("use_bidirectional_attention", "only causal attention can be built")
    c.ignore("use_bidirectional_attention")
    if not c.flag("enable_moe_block", False):
        c.ignore("num_experts", "top_k_experts", "moe_intermediate_size")


def _large(c: Config, s: Sizes, kinds: list[str]) -> Sizes:
    """Return the sizes of full attention: of ``per_layer_config``, or of keys that speak of global layers."""
    heads = c.integer("num_global_key_value_heads", s.kv_heads)
    if not c.flag("attention_k_eq_v", False):
        heads = s.kv_heads
    deep = c.integer("global_head_dim", 512)
    layers = c.part("per_layer_config")
    if layers is not None:
        # transformers writes numbers of layers with leading zeros, so that they sort.
        width = len(str(s.layers - 1)) if all(len(p) > 1 for p in layers.values) else 1
        places = [str(i).zfill(width) for i, kind in enumerate(kinds) if kind == FULL]
        if sorted(layers.values) != sorted(places):
            raise c.wrong(
                "per_layer_config", f"one entry for each layer of full attention ({', '.join(places)})"
            )
        found = set()
        for place in places:
            one = layers.part(place) or Config({}, at=layers.at)
            found.add((one.integer("head_dim", s.head_dim), one.integer("num_key_value_heads", s.kv_heads)))
        if len(found) > 1:
            raise c.wrong("per_layer_config", "the same sizes for all layers of full attention")
        deep, heads = found.pop()
    if s.heads % heads:
        raise c.wrong("num_global_key_value_heads", f'a divisor of "num_attention_heads" ({s.heads})')
    return replace(s, head_dim=deep, kv_heads=heads)


def _attention(c: Config, s: Sizes, norm: Norm, kind: str) -> Attention:
    bias = c.flag("attention_bias", False)
    found = attention(s, rope=_rope(c, s, kind), scale=1.0, qkv_bias=bias, out_bias=bias, qk_norm=norm)
    return replace(found, v_norm=norm)


def _rope(c: Config, s: Sizes, kind: str) -> Rope:
    keys = Config(WithDefaults(c.values, {"rope_parameters": _ROPES})).part("rope_parameters")
    part = keys.part(kind) if keys is not None else None
    if part is None:
        raise c.wrong("rope_parameters", f'an object with "{FULL}" and "{SLIDING}"')
    theta = part.positive("rope_theta")
    return from_parts(
        part, c, s.head_dim, max_tokens=s.max_tokens, theta=theta, kinds=(*KINDS, "proportional")
    )
