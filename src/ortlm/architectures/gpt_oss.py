"""GPT-OSS: attention sinks, a window in every second layer, YaRN, and experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import FULL, SLIDING, WithDefaults
from ortlm.architectures._parts import (
    Sizes,
    architecture,
    attention,
    check_silu,
    decoder_of,
    experts,
    sizes,
)
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, Layer, Norm, Source, Sources

MODEL_TYPES = ("gpt_oss",)

# What the rotation is where config.json does not say it.
_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_NAMES = {"router": "mlp.router", "sinks": "self_attn.sinks"}


def _stated_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotation that a GGUF file states; YaRN's ends are not rounded, as published models have it."""
    stated = values.get("rope_scaling") or {"rope_type": "default"}
    return {"rope_scaling": {**stated, "truncate": False} if stated["rope_type"] == "yarn" else stated}


GGUF = Gguf(
    "gpt-oss",
    "gpt_oss",
    mixture=True,
    keys={
        "attention.sliding_window": "sliding_window",
        "expert_feed_forward_length": "intermediate_size",
    },
    config={"rope_theta": 10000.0, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    present={"attention_bias": "attn_q.bias"},
    tensors={"blk.post_attention_norm": "post_attention_layernorm"},
    finish=_stated_rope,
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a GPT-OSS checkpoint."""
    c = Config(config)
    s = sizes(c, head_dim=64)
    check_silu(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    bias = c.flag("attention_bias", True)
    usual = WithDefaults(config, {} if c.part("rope_scaling") else {"rope_parameters": _ROPE})
    full = replace(
        attention(
            s,
            rope=rope(Config(usual), s.head_dim, max_tokens=s.max_tokens, theta=150_000.0),
            qkv_bias=bias,
            out_bias=bias,
        ),
        sinks=True,
    )
    mixers = {FULL: full, SLIDING: replace(full, window=c.window(s.max_tokens, default=128))}
    kinds = c.layer_types(s.layers, windowed=c.has("sliding_window", 128)) or [
        SLIDING if i % 2 == 0 else FULL for i in range(s.layers)
    ]
    several = replace(
        experts(c, 128, chosen=4, intermediate=s.intermediate),
        alpha=c.positive("swiglu_alpha", 1.702),
        beta=1.0,
        limit=c.positive("swiglu_limit", 7.0),
        bias=True,
        router_bias=True,
    )
    decoder = decoder_of(c, s, tuple(Layer(mixers[kind], several, norm, norm) for kind in kinds), norm)
    return architecture(decoder, "gptoss", names=_NAMES, fused=_fused(s, several.experts))


def _fused(s: Sizes, count: int) -> Sources:
    """Return where the experts' weights and the sinks lie.

    ``gate_up_proj`` is [experts, hidden, gate and up in turns], ``down_proj`` [experts, intermediate, hidden].
    """
    result: Sources = {}
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        result[f"layers.{i}.sinks.weight"] = Source(f"{layer}.self_attn.sinks")
        module, wide = f"{layer}.mlp.experts", 2 * s.intermediate
        for e in range(count):
            for first, part in enumerate(("gate", "up")):
                rows = (first, wide - 1 + first)
                result[f"layers.{i}.expert_{part}.{e}.weight"] = Source(
                    f"{module}.gate_up_proj", rows=rows, step=2, index=e, transposed=True
                )
                result[f"layers.{i}.expert_{part}.{e}.bias"] = Source(
                    f"{module}.gate_up_proj_bias", rows=rows, step=2, index=e
                )
            result[f"layers.{i}.expert_down.{e}.weight"] = Source(
                f"{module}.down_proj", index=e, transposed=True
            )
            result[f"layers.{i}.expert_down.{e}.bias"] = Source(f"{module}.down_proj_bias", index=e)
    return result
