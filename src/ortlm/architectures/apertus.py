"""Apertus: normed heads, and a plain MLP whose activation has learned numbers (xIELU)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._keys import WithDefaults
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import MLP, XIELU, Architecture, Layer, Norm, Source, parameters

MODEL_TYPES = ("apertus",)

# What the rotation is where config.json does not say it.
_ROPE = {
    "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
_NAMES = {"mixer_pre": "attention_layernorm", "ffn_pre": "feedforward_layernorm"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an Apertus checkpoint."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    bias = c.flag("attention_bias", False)
    c.expect("qk_norm", True)
    c.expect("post_norm", False)
    c.expect("mlp_bias", False)
    usual = Config(WithDefaults(config, {} if c.part("rope_scaling") else {"rope_parameters": _ROPE}))
    act = "xielu" if c.text("hidden_act", "xielu") == "xielu" else c.activation("hidden_act")
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(usual, s.head_dim, max_tokens=s.max_tokens, theta=12e6),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
        ),
        ffn=MLP(s.intermediate, act),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    numbers = {
        # Two of them are scalars there.
        p.name: Source(
            f"model.layers.{p.layer}.mlp.act_fn.{p.part}", stored=() if p.part in XIELU[2:] else None
        )
        for p in parameters(decoder)
        if p.part in XIELU
    }
    return architecture(decoder, "llama", names=_NAMES | dict.fromkeys(XIELU, ""), fused=numbers)
