"""Gemma 2: Gemma with norms around both branches, soft caps and a sliding window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import SANDWICH_TENSORS, Gguf, head_scalar
from ortlm.architectures._keys import FULL, SLIDING
from ortlm.architectures._parts import SANDWICH, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("gemma2",)
GGUF = Gguf(
    "gemma2",
    "gemma2",
    keys={
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    tensors=SANDWICH_TENSORS,
    norm_add=1.0,
    # The one of 27 billion parameters, by its layers.
    finish=lambda values: head_scalar(values, by_width=values.get("num_hidden_layers") == 46),
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Gemma 2 checkpoint."""
    c = Config(config)
    c.refuse("use_bidirectional_attention", "only causal attention can be built")
    s = sizes(c, head_dim=256)
    if not c.has("sliding_window", 4096):
        raise c.wrong("sliding_window", "a number of tokens, for the layers that have a window")
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    full = attention(
        s,
        rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
        scale=c.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=c.positive_or_none("attn_logit_softcapping", 50.0) or 0.0,
        qkv_bias=bias,
        out_bias=bias,
    )
    mixers = {FULL: full, SLIDING: replace(full, window=c.window(s.max_tokens, default=4096))}
    kinds = c.layer_types(s.layers, windowed=True) or [FULL if i % 2 else SLIDING for i in range(s.layers)]
    c.ignore("hidden_act")
    ffn = GatedMLP(s.intermediate, c.activation("hidden_activation", "gelu_pytorch_tanh"))
    decoder = decoder_of(
        c,
        s,
        tuple(Layer(mixers[kind], ffn, norm, norm, mixer_post=norm, ffn_post=norm) for kind in kinds),
        norm,
        tied=True,
        embed_scale=s.hidden**0.5,
        logit_softcap=c.positive_or_none("final_logit_softcapping", 30.0) or 0.0,
    )
    return architecture(decoder, "gemma2", names=SANDWICH, norm_add=1.0)
