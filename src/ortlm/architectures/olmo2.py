"""OLMo 2: Llama with norms after both branches instead of before; queries and keys normed over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import SANDWICH_TENSORS, Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("olmo2",)
GGUF = Gguf("olmo2", "olmo2", tensors=SANDWICH_TENSORS)

_NAMES = {"mixer_post": "post_attention_layernorm", "ffn_post": "post_feedforward_layernorm"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an OLMo 2 checkpoint."""
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
            qk_norm=norm,
            qk_norm_full=True,
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu")),
        mixer_pre=None,
        ffn_pre=None,
        mixer_post=norm,
        ffn_post=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    # onnxruntime-genai has no type of its own for OLMo 2; all it needs to know is a plain key/value cache.
    return architecture(decoder, "olmo", names=_NAMES)
