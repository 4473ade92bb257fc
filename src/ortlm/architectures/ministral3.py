"""Ministral 3: Mistral with YaRN, and queries that grow with their position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._keys import WithDefaults
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import keys_of, rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm, QueryScale

MODEL_TYPES = ("ministral3",)

# What the rotation is where config.json does not say it.
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Ministral 3 checkpoint, or of the text part of one with images."""
    c = Config(config)
    c = Config(WithDefaults(config, {} if c.part("rope_scaling") else {"rope_parameters": _ROPE}))
    s = sizes(c, head_dim=128)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    keys = keys_of(c)
    keys.ignore("max_position_embeddings")
    length = c.integer(
        "original_max_position_embeddings",
        keys.integer("original_max_position_embeddings", s.max_tokens),
    )
    full = attention(s, rope=rope(c, s.head_dim, max_tokens=s.max_tokens), window=c.window(s.max_tokens))
    mixer = replace(full, query_scale=QueryScale(keys.number("llama_4_scaling_beta"), length))
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"))
    decoder = decoder_of(c, s, (Layer(mixer, ffn, norm, norm),) * s.layers, norm)
    return architecture(decoder, "mistral")
