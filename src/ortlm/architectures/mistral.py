"""Mistral 7B and Nemo: Llama with an optional sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("mistral",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Mistral checkpoint; without ``sliding_window`` the window is 4096."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-6))
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            window=c.window(s.max_tokens, default=4096),
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu")),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    return architecture(decoder, "mistral")
