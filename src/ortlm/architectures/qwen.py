"""Qwen2, Qwen2.5 and Qwen3: Llama with biased q, k, v (Qwen2) or normed heads (Qwen3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import FULL, SLIDING
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("qwen2", "qwen3")
GGUF = (Gguf("qwen2", "qwen2"), Gguf("qwen3", "qwen3", present={"attention_bias": "attn_q.bias"}))


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a dense Qwen2, Qwen2.5 or Qwen3 checkpoint."""
    c = Config(config)
    qwen3 = c.text("model_type") == "qwen3"
    s = sizes(c, head_dim=128 if qwen3 else None)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = qwen3 and c.flag("attention_bias", False)
    full = attention(
        s,
        rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
        qkv_bias=bias or not qwen3,
        out_bias=bias,
        qk_norm=norm if qwen3 else None,
    )
    window = c.window(s.max_tokens, default=4096)
    windowed = c.flag("use_sliding_window", False) and c.has("sliding_window", 4096)
    if not windowed:
        window = None
    mixers = {FULL: full, SLIDING: replace(full, window=window)}
    first = c.integer("max_window_layers", 28, least=0)
    kinds = c.layer_types(s.layers, windowed=windowed) or [
        SLIDING if i >= first else FULL for i in range(s.layers)
    ]
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"))
    decoder = decoder_of(c, s, tuple(Layer(mixers[kind], ffn, norm, norm) for kind in kinds), norm)
    return architecture(decoder, "qwen3" if qwen3 else "qwen2")
