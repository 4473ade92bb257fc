"""LFM2 with experts: dense first layers, then experts that are chosen by the sigmoid of their logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import lfm2
from ortlm.architectures._config import Config
from ortlm.architectures._keys import WithDefaults
from ortlm.architectures._parts import MOST_WIDE, experts
from ortlm.spec import SIGMOID, Architecture, Source, Sources, parameters

MODEL_TYPES = ("lfm2_moe",)
_NAMES = {
    "router": "gate.weight",
    "offset": "expert_bias",
    "expert_gate": "experts.{}.w1.weight",
    "expert_up": "experts.{}.w3.weight",
    "expert_down": "experts.{}.w2.weight",
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an LFM2 checkpoint with experts."""
    c = Config(config)
    # The dense layers are as wide as the file says, under the newer of two names.
    fixed = {"block_auto_adjust_ff_dim": False, "block_ff_dim": None, "full_attn_idxs": None}
    dense = lfm2.describe(WithDefaults(config, {}, fixed=fixed))
    several = replace(
        experts(c, 32, chosen=4, intermediate=c.integer("moe_intermediate_size", 1792, most=MOST_WIDE)),
        routing=SIGMOID,
        offset=c.flag("use_expert_bias", True),
        summed=c.flag("norm_topk_prob", True),
        factor=c.positive("routed_scaling_factor", 1.0),
    )
    first = c.integer("num_dense_layers", 2, least=0)
    layers = tuple(
        layer if i < first else replace(layer, ffn=several) for i, layer in enumerate(dense.decoder.layers)
    )
    decoder = replace(dense.decoder, layers=layers)
    sources: Sources = {}
    for p in parameters(decoder):
        known = dense.sources.get(p.name)
        name = _NAMES.get(p.part, "").format(p.expert)
        sources[p.name] = known or Source(f"model.layers.{p.layer}.feed_forward.{name}")
    return replace(dense, decoder=decoder, sources=sources)
