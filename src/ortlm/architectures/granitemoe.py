"""Granite 3 MoE: Granite with experts, all of a layer in two tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._parts import Sizes, architecture, check_silu, experts, sizes
from ortlm.architectures.granite import GGUF as DENSE
from ortlm.architectures.granite import multiplied
from ortlm.spec import Architecture, Source, Sources

MODEL_TYPES = ("granitemoe",)
GGUF = replace(
    DENSE, name="granitemoe", model_type="granitemoe", mixture=True, present={"attention_bias": "attn_q.bias"}
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Granite MoE checkpoint; ``logits_scaling`` divides the logits."""
    c = Config(config)
    s = sizes(c)
    check_silu(c)
    several = experts(c, 8, chosen=2, intermediate=s.intermediate)
    names = {"router": "block_sparse_moe.router.layer"}
    return architecture(multiplied(c, s, several), "granite", names=names, fused=fused(s, several.experts))


def fused(s: Sizes, count: int) -> Sources:
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
