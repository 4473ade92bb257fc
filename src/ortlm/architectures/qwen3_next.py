"""Qwen3-Next: Qwen3.5 with experts whose maps of linear attention lie together, head by head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._parts import check_silu
from ortlm.architectures.qwen3_5 import decoder_with_delta_net
from ortlm.architectures.qwen_moe import of_all_layers
from ortlm.spec import CHOSEN_SOFTMAX, SOFTMAX, Architecture, DeltaNet, FeedForward, GatedMLP, Source, Sources

MODEL_TYPES = ("qwen3_next",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Qwen3-Next checkpoint."""
    c = Config(config)
    check_silu(c)
    several = replace(
        of_all_layers(c, count=512, chosen=10),
        routing=CHOSEN_SOFTMAX if c.flag("norm_topk_prob", True) else SOFTMAX,
    )
    only_dense, every = c.indices("mlp_only_layers"), c.integer("decoder_sparse_step", 1)

    def ffn_of(i: int, dense: GatedMLP) -> FeedForward:
        return dense if i in only_dense or (i + 1) % every else several

    found = decoder_with_delta_net(c, ffn_of)
    fused: Sources = {}
    for i, layer in enumerate(found.decoder.layers):
        if isinstance(layer.mixer, DeltaNet):
            fused |= _fused(layer.mixer, i)
    return replace(found, sources={**found.sources, **fused})


def _fused(mixer: DeltaNet, layer: int) -> Sources:
    """Return where the maps of linear attention lie.

    Each key head has its rows of q, k, v and z in one tensor, and of b and a in another.
    """
    each = mixer.value_heads // mixer.key_heads
    key, value = mixer.key_dim, each * mixer.value_dim
    at, size = f"model.layers.{layer}.linear_attn", 2 * key + 2 * value

    def of_all(start: int, count: int, step: int) -> tuple[tuple[int, int], ...]:
        return tuple((h * step + start, h * step + start + count) for h in range(mixer.key_heads))

    mixed = of_all(0, key, size) + of_all(key, key, size) + of_all(2 * key, value, size)
    return {
        f"layers.{layer}.in.weight": Source(f"{at}.in_proj_qkvz.weight", pieces=mixed),
        f"layers.{layer}.z.weight": Source(
            f"{at}.in_proj_qkvz.weight", pieces=of_all(2 * key + value, value, size)
        ),
        f"layers.{layer}.b.weight": Source(f"{at}.in_proj_ba.weight", pieces=of_all(0, each, 2 * each)),
        f"layers.{layer}.a.weight": Source(f"{at}.in_proj_ba.weight", pieces=of_all(each, each, 2 * each)),
    }
