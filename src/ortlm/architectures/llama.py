"""Llama 2 and 3.x, and the many models of the same form: TinyLlama, SmolLM 1 and 2, Yi, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._parts import architecture, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, Attention, Decoder, GatedMLP, Layer, Norm

MODEL_TYPES = ("llama",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Llama checkpoint; ``attention_bias`` is of all four projections."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-6))
    bias = c.flag("attention_bias", False)
    layer = Layer(
        mixer=Attention(
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            scale=s.head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu"), bias=c.flag("mlp_bias", False)),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = Decoder(
        vocab=s.vocab,
        hidden=s.hidden,
        layers=(layer,) * s.layers,
        final_norm=norm,
        max_tokens=s.max_tokens,
        tied_head=c.flag("tie_word_embeddings", False),
    )
    return architecture(decoder, "llama")
