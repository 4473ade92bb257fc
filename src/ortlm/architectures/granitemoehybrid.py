"""Granite 4 with attention in every layer: Granite whose MLP is fused, with or without experts next to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import granitemoe
from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, shown
from ortlm.architectures._parts import architecture, check_silu, experts, sizes
from ortlm.architectures.granite import multiplied
from ortlm.errors import UnsupportedModel
from ortlm.spec import Architecture, Experts, GatedMLP, Source, Sources

MODEL_TYPES = ("granitemoehybrid",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Granite 4 checkpoint; without "rope" there are no positions at all."""
    c = Config(config)
    s = sizes(c)
    kinds = c.values.get("layer_types") or c.values.get("layers_block_type") or ["linear_attention"]
    other = {str(kind) for kind in kinds} - {"attention", FULL} if isinstance(kinds, list) else {"unknown"}
    if other or len(kinds) != s.layers:
        raise UnsupportedModel(
            f'{c.at}: "layer_types" is {shown(kinds)}; only attention in all {s.layers} layers can be built.'
        )
    c.ignore(*(key for key in c.values if key.startswith("mamba_")), "time_step_limit")
    wide = c.integer("shared_intermediate_size", 1024)
    ffn: GatedMLP | Experts = GatedMLP(wide, c.activation("hidden_act", "silu"))
    fused = _shared(s.layers, wide, "")
    if c.integer("num_local_experts", 8, least=0):
        check_silu(c)
        ffn = replace(experts(c, 8, chosen=2, intermediate=s.intermediate), shared=wide)
        fused = _shared(s.layers, wide, "shared_") | granitemoe.fused(s, ffn.experts)
    c.ignore("num_experts_per_tok", "intermediate_size")
    rotates = c.text("position_embedding_type", "none") == "rope"
    names = {
        "down": "shared_mlp.output_linear", "shared_down": "shared_mlp.output_linear",
        "shared_gate": "", "shared_up": "", "router": "block_sparse_moe.router.layer",
    }  # fmt: skip
    decoder = multiplied(c, s, ffn)
    if not rotates:
        both = zip(decoder.layers, decoder.attentions, strict=True)
        layers = tuple(replace(layer, mixer=replace(mixer, rope=None)) for layer, mixer in both)
        decoder = replace(decoder, layers=layers)
    return architecture(decoder, "granite", names=names, fused=fused)


def _shared(layers: int, wide: int, prefix: str) -> Sources:
    """Return where gate and up lie, as rows."""
    found: Sources = {}
    for i in range(layers):
        tensor = f"model.layers.{i}.shared_mlp.input_linear.weight"
        found[f"layers.{i}.{prefix}gate.weight"] = Source(tensor, rows=(0, wide))
        found[f"layers.{i}.{prefix}up.weight"] = Source(tensor, rows=(wide, 2 * wide))
    return found
