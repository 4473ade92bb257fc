"""Arcee (AFM): Llama with a plain MLP and a squared ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import MLP, Architecture, Layer, Norm

MODEL_TYPES = ("arcee",)

GGUF = Gguf(
    "arcee",
    "arcee",
    present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"},
    interleaved=True,
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an Arcee checkpoint."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    bias = c.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=MLP(s.intermediate, c.activation("hidden_act", "relu2"), bias=c.flag("mlp_bias", False)),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    return architecture(decoder_of(c, s, (layer,) * s.layers, norm), "llama")
