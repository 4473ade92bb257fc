"""Gemma 1: Llama with scaled embeddings, norms stored as ``weight - 1`` and a tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("gemma",)
GGUF = Gguf("gemma", "gemma", norm_add=1.0)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Gemma 1 checkpoint."""
    c = Config(config)
    c.refuse("use_bidirectional_attention", "only causal attention can be built")
    s = sizes(c, head_dim=256)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    act = c.activation("hidden_act", "gelu_pytorch_tanh")
    # transformers looks at the other key alone; files where they differ meant this one, once.
    if c.activation("hidden_activation", "gelu") not in ("gelu", "gelu_tanh", act):
        raise c.wrong("hidden_activation", 'what "hidden_act" is')
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            qkv_bias=bias,
            out_bias=bias,
        ),
        # The first files say "gelu", but the models were trained with the tanh form.
        ffn=GatedMLP(s.intermediate, "gelu_tanh" if act == "gelu" else act),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm, tied=True, embed_scale=s.hidden**0.5)
    return architecture(decoder, "gemma", norm_add=1.0)
