"""Granite 3 MoE: Granite with experts, all of a layer in two tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
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

MODEL_TYPES = ("granitemoe",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Granite MoE checkpoint; ``logits_scaling`` divides the logits."""
    c = Config(config)
    s = sizes(c)
    check_silu(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    several = experts(c, 8, chosen=2, intermediate=s.intermediate)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            scale=c.positive("attention_multiplier", 1.0),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=several,
        mixer_pre=norm,
        ffn_pre=norm,
        residual_scale=c.positive("residual_multiplier", 1.0),
    )
    decoder = decoder_of(
        c,
        s,
        (layer,) * s.layers,
        norm,
        embed_scale=c.positive("embedding_multiplier", 1.0),
        logit_scale=1.0 / c.positive("logits_scaling", 1.0),
    )
    names = {"router": "block_sparse_moe.router.layer"}
    return architecture(decoder, "granite", names=names, fused=_fused(s, several.experts))


def _fused(s: Sizes, count: int) -> Sources:
    """Return where experts lie: ``input_linear`` [experts, gate and up, hidden], ``output_linear``."""
    result: Sources = {}
    for i in range(s.layers):
        block = f"model.layers.{i}.block_sparse_moe"
        wide, narrow = f"{block}.input_linear.weight", f"{block}.output_linear.weight"
        for e in range(count):
            result[f"layers.{i}.expert_gate.{e}.weight"] = Source(wide, rows=(0, s.intermediate), index=e)
            result[f"layers.{i}.expert_up.{e}.weight"] = Source(
                wide, rows=(s.intermediate, 2 * s.intermediate), index=e
            )
            result[f"layers.{i}.expert_down.{e}.weight"] = Source(narrow, index=e)
    return result
