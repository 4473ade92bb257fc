"""Helium: Llama that rotates neighbors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._llama_like import llama_like
from ortlm.architectures._parts import architecture, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture

MODEL_TYPES = ("helium",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Helium checkpoint; ``attention_bias`` is of q, k and v."""
    c = Config(config)
    s = sizes(c, head_dim=128, kv_heads=20)
    if s.heads * s.head_dim != s.hidden:
        raise c.wrong("head_dim", f'"hidden_size" over "num_attention_heads" ({s.hidden // s.heads})')
    decoder = llama_like(
        c,
        s,
        rope(c, s.head_dim, max_tokens=s.max_tokens, theta=100_000.0, interleaved=True),
        eps=1e-8,
        qkv_bias=c.flag("attention_bias", False),
        mlp_bias=c.flag("mlp_bias", False),
    )
    return architecture(decoder, "llama")
