"""Hunyuan, the dense ones of 2025: heads normed after they are rotated, and a base that grows with alpha."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import WithDefaults
from ortlm.architectures._parts import Sizes, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import from_parts, keys_of
from ortlm.spec import Architecture, GatedMLP, Layer, Norm, Rope

MODEL_TYPES = ("hunyuan_v1_dense",)

# What "alpha" makes of the base of the rotation is in the files already.
GGUF = Gguf(
    "hunyuan-dense",
    "hunyuan_v1_dense",
    present={"attention_bias": "attn_q.bias"},
    tensors={
        "blk.attn_q_norm": "self_attn.query_layernorm",
        "blk.attn_k_norm": "self_attn.key_layernorm",
    },
)

_NAMES = {"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a dense Hunyuan checkpoint: 0.5, 1.8, 4 or 7 B parameters."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    bias = c.flag("attention_bias", False)
    c.expect("attention_head_dim", s.head_dim)
    c.expect("use_qk_norm", True)
    c.expect("use_rotary_pos_emb", True)
    c.expect("norm_type", "rms", "hf_rms", "fused")
    c.refuse("use_cla", "layers that share keys and values cannot be built")
    c.ignore(
        "cla_share_factor", "org_vocab_size", "enable_lm_head_fp32", "dense_list", "add_classification_head"
    )
    mixer = replace(
        attention(s, rope=_rope(c, s), qkv_bias=bias, out_bias=bias, qk_norm=norm), qk_norm_late=True
    )
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"))
    decoder = decoder_of(c, s, (Layer(mixer, ffn, norm, norm),) * s.layers, norm)
    return architecture(decoder, "hunyuandensev1", names=_NAMES)


def _rope(c: Config, s: Sizes) -> Rope:
    """Return the rotation; with ``alpha``, "dynamic" is another base at any length."""
    keys = keys_of(c)
    c.ignore("rope_parameters")
    theta = keys.positive("rope_theta", c.positive("rope_theta", 10_000.0))
    if keys.text("rope_type", keys.text("type", "default")) == "dynamic" and keys.has("alpha"):
        theta *= keys.positive("alpha") ** (s.head_dim / (s.head_dim - 2))
        fixed = {"rope_type": "default", "rope_theta": theta}
        keys = Config(WithDefaults(keys.values, {}, fixed=fixed), at=keys.at)
    return from_parts(keys, c, s.head_dim, max_tokens=s.max_tokens, theta=theta)
