"""SmolLM3: Llama without rotation in every fourth layer."""

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

MODEL_TYPES = ("smollm3",)
GGUF = Gguf(
    "smollm3",
    "smollm3",
    interleaved=True,
    present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a SmolLM3 checkpoint; in ``no_rope_layers`` a 1 stands for rotation."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    full = attention(
        s,
        rope=rope(c, s.head_dim, max_tokens=s.max_tokens, theta=2e6),
        qkv_bias=bias,
        out_bias=bias,
    )
    every = c.integer("no_rope_layer_interval", 4)
    rotates = c.integers("no_rope_layers", length=s.layers) or [(i + 1) % every for i in range(s.layers)]
    window = c.window(s.max_tokens)
    windowed = c.flag("use_sliding_window", False) and c.has("sliding_window")
    windows = {FULL: None, SLIDING: window if windowed else None}
    kinds = c.layer_types(s.layers, windowed=windowed) or [FULL if turn else SLIDING for turn in rotates]
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"), bias=c.flag("mlp_bias", False))
    layers = []
    for kind, turn in zip(kinds, rotates, strict=True):
        mixer = replace(full, rope=full.rope if turn else None, window=windows[kind])
        layers.append(Layer(mixer, ffn, norm, norm))
    decoder = decoder_of(c, s, tuple(layers), norm, tied=True)
    return architecture(decoder, "smollm3")
