"""Gemma 3n, text: several residual streams (AltUp), shared keys, per-layer embeddings, sparse activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, SLIDING, WithDefaults
from ortlm.architectures._parts import (
    MOST_LAYERS,
    MOST_WIDE,
    SANDWICH,
    architecture,
    attention,
    decoder_of,
    sizes,
)
from ortlm.architectures._per_layer import (
    PER_LAYER_NAMES,
    kv_sources,
    per_layer_inputs,
    per_layer_sources,
    unused,
)
from ortlm.architectures._text_part import text_only, text_part
from ortlm.architectures.gemma3 import ropes
from ortlm.spec import AltUp, Architecture, Decoder, GatedMLP, Laurel, Layer, Norm, Source

MODEL_TYPES = ("gemma3n_text", "gemma3n")

_NAMES = {
    "laurel_left": "laurel.linear_left",
    "laurel_right": "laurel.linear_right",
    "laurel_post": "laurel.post_laurel_norm",
    "altup_norm": "altup.router_norm",
    "altup_router": "altup.modality_router",
    "altup_predict": "altup.prediction_coefs",
    "altup_correct": "altup.correction_coefs",
    "altup_scale": "",
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Gemma 3n text decoder."""
    if config["model_type"] == "gemma3n":
        inner, tied = text_part(config, tied=True)
        return text_only(
            describe(WithDefaults(inner.values, {}, fixed={**tied, "model_type": "gemma3n_text"}))
        )
    c = Config(config)
    c.refuse("use_bidirectional_attention", "only causal attention can be built")
    c.ignore(
        "altup_coef_clip", "altup_lr_multiplier", "query_pre_attn_scalar"
    )  # of training; scores are not scaled
    count = c.integer("num_hidden_layers", most=MOST_LAYERS)
    wide = _widths(c, count)
    s = sizes(
        Config(WithDefaults(config, {}, fixed={"intermediate_size": wide[0]})), head_dim=256, kv_heads=2
    )
    if not c.has("sliding_window", 512):
        raise c.wrong("sliding_window", "a number of tokens, for the layers that have a window")
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias, turns = c.flag("attention_bias", False), ropes(c, s)
    windows = {FULL: None, SLIDING: c.window(s.max_tokens, default=512)}
    plain = replace(
        attention(s, rope=None, scale=1.0, qkv_bias=bias, out_bias=bias, qk_norm=norm), v_norm=norm
    )
    mixers = {kind: replace(plain, rope=turns[kind], window=windows[kind]) for kind in (FULL, SLIDING)}
    kinds = c.layer_types(count, windowed=True) or [
        FULL if not (i + 1) % 5 else SLIDING for i in range(count)
    ]
    act = c.activation("hidden_activation", "gelu_pytorch_tanh")
    inputs = per_layer_inputs(c, s, norm, act)
    if inputs is None:
        raise c.wrong("hidden_size_per_layer_input", "a number above 0")
    if not c.has("final_logit_softcapping", 30.0):
        raise c.wrong("final_logit_softcapping", "a number > 0")
    laurel = Laurel(c.integer("laurel_rank", 64), norm)
    layer = Layer(
        plain, GatedMLP(s.intermediate, act), norm, norm,
        mixer_post=norm, ffn_post=norm, per_layer_post=norm, laurel=laurel,
    )  # fmt: skip
    parts = zip(kinds, kv_sources(c, kinds, absent=15), wide, _cutoffs(c, count), strict=True)
    layers = [
        replace(
            layer,
            mixer=replace(mixers[kind], shared=source),
            ffn=GatedMLP(width, act, cutoff=cutoff),
        )
        for kind, source, width, cutoff in parts
    ]
    decoder = decoder_of(
        c,
        s,
        tuple(layers),
        norm,
        tied=True,
        embed_scale=s.hidden**0.5,
        logit_softcap=c.positive("final_logit_softcapping", 30.0),
        per_layer_inputs=inputs,
        altup=_altup(c, norm),
    )
    return unused(_with_sources(decoder))


def _widths(c: Config, layers: int) -> list[int]:
    """Return the channels of each layer's MLP: one number for all, or a list."""
    key = "intermediate_size"
    if not isinstance(c.values.get(key), list):
        return [c.integer(key, 16_384, most=MOST_WIDE)] * layers
    found = c.integers(key, length=layers) or []
    if len(c.values[key]) != layers or not all(1 <= width <= MOST_WIDE for width in found):
        raise c.wrong(key, f"a list of {layers} whole numbers, one for each layer")
    return found


def _cutoffs(c: Config, layers: int) -> list[float | None]:
    """Return how many standard deviations above the mean each layer's activations begin; None is everywhere."""
    key = "activation_sparsity_pattern"
    shares = c.values.get(key)
    if shares is None:
        sparse = 10 if layers > 10 else 0
        shares = [0.95] * sparse + [0.0] * (layers - sparse)
    fine = isinstance(shares, list) and len(shares) == layers
    if not fine or not all(isinstance(p, (int, float)) and 0 <= p < 1 for p in shares):
        raise c.wrong(key, f"a list of {layers} numbers from 0 to below 1, one for each layer")
    normal = NormalDist()
    # transformers has them in float32.
    return [normal.inv_cdf(float(np.float32(p))) if p else None for p in shares]


def _altup(c: Config, norm: Norm) -> AltUp:
    streams = c.integer("altup_num_inputs", 4, most=64)
    active = c.integer("altup_active_idx", 0, least=0)
    if active >= streams:
        raise c.wrong("altup_active_idx", f'below "altup_num_inputs" ({streams})')
    return AltUp(streams, active, norm, scaled=c.flag("altup_correct_scale", True))


def _with_sources(decoder: Decoder) -> Architecture:
    altup = decoder.altup
    count = altup.streams if altup is not None else 1
    both = (("altup_in", "altup_projections"), ("altup_out", "altup_unembed_projections"))
    outer = {f"{part}{i}": f"model.{module}.{i - 1}" for part, module in both for i in range(1, count)}
    scales = {
        f"layers.{i}.altup_scale.weight": Source(f"model.layers.{i}.altup.correct_output_scale")
        for i in range(len(decoder.layers))
        if altup is not None and altup.scaled
    }
    found = architecture(
        decoder,
        "llama",
        names={**SANDWICH, **PER_LAYER_NAMES, **_NAMES, **outer},
        fused={**scales, **per_layer_sources(decoder)},
    )
    # It is there, whether or not it is used.
    return replace(found, ignored=(*found.ignored, "model.layers.*.altup.correct_output_scale"))
