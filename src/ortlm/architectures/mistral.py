"""Mistral 7B, Nemo and Ministral: Llama with a sliding window in every layer, in some or in none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, SLIDING
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("mistral", "ministral")


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Mistral checkpoint; without ``sliding_window`` the window is 4096.

    ``layer_types`` says which layers have it. transformers reads a Mistral with that key as a Ministral.
    """
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    full = attention(s, rope=rope(c, s.head_dim, max_tokens=s.max_tokens))
    mixers = {FULL: full, SLIDING: replace(full, window=c.window(s.max_tokens, default=4096))}
    kinds = c.layer_types(s.layers, windowed=c.has("sliding_window", 4096)) or [SLIDING] * s.layers
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"))
    decoder = decoder_of(c, s, tuple(Layer(mixers[kind], ffn, norm, norm) for kind in kinds), norm)
    return architecture(decoder, "mistral")
