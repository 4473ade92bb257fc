"""Phi-3.5-MoE: Llama with LayerNorm and biases, LongRoPE, and two of sixteen experts chosen by a sparse mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import WithDefaults
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
from ortlm.architectures.mixtral import NAMES
from ortlm.errors import UnsupportedModel
from ortlm.spec import SPARSE_MIXER, Architecture, Layer, Norm, Rope

MODEL_TYPES = ("phimoe",)
GGUF = Gguf(
    "phimoe",
    "phimoe",
    mixture=True,
    refused="Such files do not hold what the rotation of this family is scaled by (short_mscale, long_mscale): "
    "llama.cpp writes another number for it. Build from the Hugging Face checkpoint.",
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Phi-3.5-MoE checkpoint."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0), kind="layer", bias=True)
    bias = c.flag("attention_bias", False)
    check_silu(c)
    several = experts(c, 16, chosen=2, intermediate=s.intermediate)
    if several.top_k != 2:
        raise UnsupportedModel(
            f'{c.at}: "num_experts_per_tok" is {several.top_k}; the sparse mixer of this family is known for 2.'
        )
    eps = c.number("router_jitter_noise", 0.01, least=0.0)
    layer = Layer(
        mixer=attention(
            s, rope=_rope(config, s), window=c.window(s.max_tokens), qkv_bias=bias, out_bias=bias
        ),
        ffn=replace(several, routing=SPARSE_MIXER, mixer_eps=eps),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm, head_bias=c.flag("lm_head_bias", False))
    return architecture(decoder, "phimoe", names=NAMES)


def _rope(config: Mapping[str, Any], s: Sizes) -> Rope:
    """Return the rotation: LongRoPE whose two tables are scaled by numbers that the file states."""
    c = Config(config)
    scaling = c.part("rope_scaling") or c.part("rope_parameters")
    original = scaling.integer("original_max_position_embeddings", 0, least=0) if scaling else 0
    if original:
        # The model's own code looks nowhere else.
        c.ignore("original_max_position_embeddings")
        config = WithDefaults(config, {}, fixed={"original_max_position_embeddings": original})
    found = rope(
        Config(config), s.head_dim, max_tokens=s.max_tokens, theta=1e6, kinds=("default", "longrope")
    )
    if scaling is None or scaling.text("rope_type", scaling.text("type", "default")) == "default":
        return found
    short, long = scaling.positive("short_mscale"), scaling.positive("long_mscale")
    return replace(found, factor=short, long_factor=long if found.long_inv_freq else 1.0)
