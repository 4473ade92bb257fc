"""Qwen3.5 text: gated DeltaNet in three of four layers, and attention whose output is gated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, WithDefaults
from ortlm.architectures._parts import (
    MOST_WIDE,
    architecture,
    attention,
    check_silu,
    decoder_of,
    sizes,
    stacked_experts,
)
from ortlm.architectures._rope import keys_of, rope
from ortlm.architectures._text_part import text_only, text_part
from ortlm.architectures.qwen_moe import SHARED_NAMES, of_all_layers
from ortlm.spec import Architecture, DeltaNet, FeedForward, GatedMLP, Layer, Norm, Source

MODEL_TYPES = ("qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe")
_LINEAR = "linear_attention"
_NAMES = {
    "in": "linear_attn.in_proj_qkv",
    "z": "linear_attn.in_proj_z",
    "b": "linear_attn.in_proj_b",
    "a": "linear_attn.in_proj_a",
    "conv": "linear_attn.conv1d",
    "a_log": "linear_attn.A_log",
    "dt_bias": "linear_attn.dt_bias",
    "out_norm": "linear_attn.norm",
    **SHARED_NAMES,
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of the text of a Qwen3.5 checkpoint; published ones hold more."""
    kind = config["model_type"]
    several = kind.startswith("qwen3_5_moe")
    if kind in ("qwen3_5", "qwen3_5_moe"):
        inner, fixed = text_part(config, tied=False)
        return text_only(_described(WithDefaults(inner.values, {}, fixed=fixed), several=several))
    return _described(config, several=several)


def _described(config: Mapping[str, Any], *, several: bool) -> Architecture:
    c = Config(WithDefaults(config, {"intermediate_size": 1} if several else {}))
    c.ignore(*(("intermediate_size",) if several else ()))
    c.expect("mlp_only_layers", [])
    if several:
        check_silu(c)
    ffn = of_all_layers(c, count=256, chosen=8) if several else None
    found = decoder_with_delta_net(c, lambda i, dense: ffn or dense)
    return replace(found, others=stacked_experts(found.decoder, "mlp.experts")) if several else found


def decoder_with_delta_net(c: Config, ffn_of: Callable[[int, GatedMLP], FeedForward]) -> Architecture:
    """Return the architecture of a decoder with gated DeltaNet.

    ``ffn_of`` returns the feed-forward block of a layer for its number and the dense block.
    """
    s = sizes(c, head_dim=256)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    c.expect("attn_output_gate", True)
    # Drafts of several tokens, whose tensors are left out, and the dtype of states, which is float32 here.
    c.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    # The three positions of a token are the same in texts.
    keys_of(c).ignore("mrope_section", "mrope_interleaved")
    turned = rope(c, s.head_dim, max_tokens=s.max_tokens, partial=0.25)
    full = replace(attention(s, rope=turned, qkv_bias=bias, out_bias=bias, qk_norm=norm), gated=True)
    linear = DeltaNet(
        key_heads=c.integer("linear_num_key_heads", 16, most=MOST_WIDE),
        value_heads=c.integer("linear_num_value_heads", 32, most=MOST_WIDE),
        key_dim=c.integer("linear_key_head_dim", 128, most=MOST_WIDE),
        value_dim=c.integer("linear_value_head_dim", 128, most=MOST_WIDE),
        kernel=c.integer("linear_conv_kernel_dim", 4, least=2, most=64),
        norm=norm,
    )
    if linear.value_heads % linear.key_heads:
        raise c.wrong("linear_num_value_heads", f'a multiple of "linear_num_key_heads" ({linear.key_heads})')
    kinds = c.layer_kinds(s.layers, (FULL, _LINEAR))
    every = c.integer("full_attention_interval", 4)
    kinds = kinds or [_LINEAR if (i + 1) % every else FULL for i in range(s.layers)]
    if FULL not in kinds:
        raise c.wrong("layer_types", f'a list with at least one "{FULL}"')
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"))
    if ffn.act != "silu":
        raise c.wrong("hidden_act", '"silu", which the convolutions take as well')
    layers = tuple(
        Layer(full if kind == FULL else linear, ffn_of(i, ffn), norm, norm) for i, kind in enumerate(kinds)
    )
    outs = {f"layers.{i}.o": "linear_attn.out_proj" for i, kind in enumerate(kinds) if kind == _LINEAR}
    found = architecture(
        decoder_of(c, s, layers, norm), "qwen3_5_text", names={**_NAMES, **outs}, norm_add=1.0
    )
    # These two are no modules, and have no kind in their names.
    bare = {
        name: Source(source.tensor.removesuffix(".weight"))
        for name, source in found.sources.items()
        if name.endswith((".a_log.weight", ".dt_bias.weight"))
    }
    return replace(
        found, sources={**found.sources, **bare}, ignored=(*found.ignored, "mtp.*", "model.visual.*")
    )
