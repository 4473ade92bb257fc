"""Seed-OSS: Llama with biased q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._llama_like import llama_like
from ortlm.architectures._parts import architecture, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture

MODEL_TYPES = ("seed_oss",)

GGUF = Gguf(
    "seed_oss",
    "seed_oss",
    present={
        "attention_bias": "attn_q.bias",
        "attention_out_bias": "attn_output.bias",
        "mlp_bias": "ffn_gate.bias",
    },
    tensors={"blk.post_attention_norm": "post_attention_layernorm"},
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Seed-OSS checkpoint; ``attention_out_bias`` is of the output projection."""
    c = Config(config)
    s = sizes(c, head_dim=128, kv_heads=8)
    decoder = llama_like(
        c,
        s,
        rope(c, s.head_dim, max_tokens=s.max_tokens),
        eps=1e-6,
        qkv_bias=c.flag("attention_bias", True),
        out_bias=c.flag("attention_out_bias", False),
        mlp_bias=c.flag("mlp_bias", False),
    )
    return architecture(decoder, "llama")
