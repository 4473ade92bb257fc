"""Llama 2 and 3.x, and the many models of the same form: TinyLlama, SmolLM 1 and 2, Yi and more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("llama",)
GGUF = Gguf(
    "llama", "llama", interleaved=True, present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"}
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Llama checkpoint; ``attention_bias`` is of all four projections."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu"), bias=c.flag("mlp_bias", False)),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    return architecture(decoder, "llama")
