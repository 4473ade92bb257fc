"""Nemotron 3 and 4, Minitron: LayerNorm stored as ``weight - 1``, a plain MLP with a squared ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import MLP, Architecture, Layer, Norm

MODEL_TYPES = ("nemotron",)

GGUF = Gguf(
    "nemotron",
    "nemotron",
    keys={"attention.layer_norm_epsilon": "norm_eps"},
    config={"partial_rotary_factor": 1.0},
    present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"},
    norm_add=1.0,
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Nemotron or Minitron checkpoint; half of each head is rotated."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("norm_eps", 1e-5, most=1.0), kind="layer", bias=True)
    bias = c.flag("attention_bias", False)
    c.expect("rope_percent", c.values.get("partial_rotary_factor", 0.5))
    c.expect("kv_channels", s.head_dim)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens, partial=0.5),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=MLP(s.intermediate, c.activation("hidden_act", "relu2"), bias=c.flag("mlp_bias", False)),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    return architecture(decoder_of(c, s, (layer,) * s.layers, norm), "nemotron", norm_add=1.0)
