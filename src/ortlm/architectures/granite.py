"""Granite 3: Llama with a multiplier on embeddings, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import Sizes, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, Decoder, Experts, GatedMLP, Layer, Norm

MODEL_TYPES = ("granite",)
GGUF = Gguf(
    "granite",
    "granite",
    keys={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    required={"rope.scaling.finetuned": True},
    present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
    interleaved=True,
    finish=lambda values: {
        "attention_multiplier": values.get("attention_multiplier") or values["head_dim"] ** -0.5
    },
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a dense Granite checkpoint; ``logits_scaling`` divides the logits."""
    c = Config(config)
    s = sizes(c)
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"), bias=c.flag("mlp_bias", False))
    return architecture(multiplied(c, s, ffn), "granite")


def multiplied(c: Config, s: Sizes, ffn: GatedMLP | Experts) -> Decoder:
    """Return a decoder with Granite's multipliers and ``ffn`` in every layer."""
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            scale=c.positive("attention_multiplier", 1.0),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=ffn,
        mixer_pre=norm,
        ffn_pre=norm,
        residual_scale=c.positive("residual_multiplier", 1.0),
    )
    return decoder_of(
        c,
        s,
        (layer,) * s.layers,
        norm,
        embed_scale=c.positive("embedding_multiplier", 1.0),
        logit_scale=1.0 / c.positive("logits_scaling", 1.0),
    )
