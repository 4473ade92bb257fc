"""ERNIE 4.5, the dense ones: Llama that rotates neighbors, with biases in all matrices or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._llama_like import llama_like
from ortlm.architectures._parts import architecture, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture

MODEL_TYPES = ("ernie4_5",)

GGUF = Gguf("ernie4_5", "ernie4_5", present={"use_bias": "attn_q.bias"})


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a dense ERNIE 4.5 checkpoint."""
    c = Config(config)
    s = sizes(c, head_dim=128, kv_heads=2)
    turned = rope(c, s.head_dim, max_tokens=s.max_tokens, theta=500_000.0, interleaved=True)
    bias = c.flag("use_bias", False)
    c.expect("compression_ratio", 1.0)
    decoder = llama_like(c, s, turned, eps=1e-5, qkv_bias=bias, out_bias=bias, mlp_bias=bias, tied=True)
    return architecture(decoder, "ernie4_5")
