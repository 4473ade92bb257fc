"""Gemma 1: Llama with scaled embeddings, norms stored as ``weight - 1`` and a tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._parts import architecture, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, Attention, Decoder, GatedMLP, Layer, Norm

MODEL_TYPES = ("gemma",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Gemma 1 checkpoint."""
    c = Config(config)
    c.refuse("use_bidirectional_attention", "only causal attention can be built")
    s = sizes(c, head_dim=256)
    norm = Norm(c.positive("rms_norm_eps", 1e-6))
    bias = c.flag("attention_bias", False)
    act = c.activation("hidden_activation", c.text("hidden_act", "gelu_pytorch_tanh"))
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
        # The first files say "gelu", but the models were trained with the tanh form.
        ffn=GatedMLP(s.intermediate, "gelu_tanh" if act == "gelu" else act),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = Decoder(
        vocab=s.vocab,
        hidden=s.hidden,
        layers=(layer,) * s.layers,
        final_norm=norm,
        max_tokens=s.max_tokens,
        tied_head=c.flag("tie_word_embeddings", True),
        embed_scale=s.hidden**0.5,
    )
    return architecture(decoder, "gemma", norm_add=1.0)
