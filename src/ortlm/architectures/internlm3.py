"""InternLM 3: Llama with biases in all matrices of the layers or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._llama_like import llama_like
from ortlm.architectures._parts import architecture, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture

MODEL_TYPES = ("internlm3",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an InternLM 3 checkpoint; its two kinds of biases must be the same."""
    c = Config(config)
    s = sizes(c, head_dim=128, kv_heads=2)
    # Published files have the names that come second.
    bias = c.flag("attention_bias", c.flag("qkv_bias", False))
    if c.flag("mlp_bias", c.flag("bias", False)) != bias:
        raise c.wrong("bias", f'what "qkv_bias" is ({str(bias).lower()})')
    turned = rope(c, s.head_dim, max_tokens=s.max_tokens)
    decoder = llama_like(c, s, turned, eps=1e-5, qkv_bias=bias, out_bias=bias, mlp_bias=bias)
    return architecture(decoder, "llama")
