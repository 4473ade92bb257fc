"""Qwen3.5 text, the dense ones: gated DeltaNet in three of four layers, and attention whose output is gated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, WithDefaults
from ortlm.architectures._parts import MOST_WIDE, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import keys_of, rope
from ortlm.architectures._text_part import text_only, text_part
from ortlm.spec import Architecture, DeltaNet, GatedMLP, Layer, Norm, Source

MODEL_TYPES = ("qwen3_5_text", "qwen3_5")
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
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of the text of a dense Qwen3.5 checkpoint; published ones hold more."""
    if config["model_type"] == "qwen3_5":
        inner, fixed = text_part(config, tied=False)
        return text_only(_described(Config(WithDefaults(inner.values, {}, fixed=fixed))))
    return _described(Config(config))


def _described(c: Config) -> Architecture:
    s = sizes(c, head_dim=256)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    c.expect("attn_output_gate", True)
    c.expect("mlp_only_layers", [])
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
    layers = tuple(Layer(full if kind == FULL else linear, ffn, norm, norm) for kind in kinds)
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
