"""Gemma 3 with images: SigLIP, then the text model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import gemma3
from ortlm.architectures._config import Config
from ortlm.architectures._keys import WithDefaults
from ortlm.architectures._parts import VISION_LAYER, check_colors
from ortlm.spec import (
    MLP,
    Architecture,
    Encoder,
    ImagePrompt,
    Norm,
    PanAndScan,
    Pooled,
    Source,
    Sources,
    Vision,
    vision_parameters,
)

MODEL_TYPES = ("gemma3",)

_TEXT, _SIGLIP, _PROJECTOR = "language_model.", "vision_tower.vision_model", "multi_modal_projector"
_NAMES = {
    "patches.weight": f"{_SIGLIP}.embeddings.patch_embedding.weight",
    "patches.bias": f"{_SIGLIP}.embeddings.patch_embedding.bias",
    "positions.weight": f"{_SIGLIP}.embeddings.position_embedding.weight",
    "final_norm.weight": f"{_SIGLIP}.post_layernorm.weight",
    "final_norm.bias": f"{_SIGLIP}.post_layernorm.bias",
    "join_norm.weight": f"{_PROJECTOR}.mm_soft_emb_norm.weight",
    "join.weight": f"{_PROJECTOR}.mm_input_projection_weight",
}
# What the text part of a published configuration leaves to transformers' defaults.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Gemma 3 checkpoint of 4, 12 or 27 B parameters, or a fine-tune of one."""
    c = Config(config)
    inner = c.part("text_config") or Config({}, at=f"{c.at}: text_config")
    # Whether the head is tied is said of the whole model, not of its text part.
    tied = {"tie_word_embeddings": c.flag("tie_word_embeddings", True)}
    inner.ignore("tie_word_embeddings")
    if inner.has("final_logit_softcapping"):
        raise inner.wrong(
            "final_logit_softcapping", "null, since the class of models with images has no such cap"
        )
    text = gemma3.describe(WithDefaults(inner.values, _DEFAULTS, fixed=tied))
    encoder = _encoder(c)
    vision = _vision(c, encoder)
    sources = {name: replace(s, tensor=f"{_TEXT}{s.tensor}") for name, s in text.sources.items()}
    return replace(
        text,
        vision=vision,
        sources={**sources, **_sources(vision, encoder, text.decoder.hidden)},
        genai_type="gemma3",
        ignored=(*text.ignored, f"{_SIGLIP}.head.*", "*.position_ids"),
        head_copy=f"{_TEXT}{text.head_copy}",
        # transformers 5 writes other prefixes than the checkpoints on the hub have.
        renamed=(
            (f"{_SIGLIP}.", "vision_tower."),
            (f"{_SIGLIP}.", "model.vision_tower.vision_model."),
            (f"{_TEXT}model.", "model.language_model."),
            (f"{_PROJECTOR}.", f"model.{_PROJECTOR}."),
            (f"{_TEXT}lm_head.", "lm_head."),
            # The class without a head has no prefix before its parts.
            (f"{_TEXT}model.", _TEXT),
        ),
    )


def _encoder(c: Config) -> Encoder:
    p = c.part("vision_config") or Config({}, at=f"{c.at}: vision_config")
    check_colors(p)
    p.ignore("vision_use_head")
    hidden = p.integer("hidden_size", 1152)
    norm = Norm(p.positive("layer_norm_eps", 1e-6, most=1.0), kind="layer", bias=True)
    encoder = Encoder(
        side=p.integer("image_size", 896),
        patch=p.integer("patch_size", 14),
        hidden=hidden,
        heads=p.integer("num_attention_heads", 16),
        layers=p.integer("num_hidden_layers", 27),
        ffn=MLP(
            p.integer("intermediate_size", 4304), p.activation("hidden_act", "gelu_pytorch_tanh"), bias=True
        ),
        norm=norm,
        patch_bias=True,
        final_norm=True,
    )
    if hidden % encoder.heads:
        raise p.wrong("num_attention_heads", f"a divisor of the vision encoder's {hidden} channels")
    return encoder


def _vision(c: Config, encoder: Encoder) -> Vision:
    count = c.integer("mm_tokens_per_image", 256)
    side = round(count**0.5)
    if side * side != count or encoder.grid % side:
        raise c.wrong(
            "mm_tokens_per_image", f"a square, its side dividing the vision encoder's {encoder.grid} patches"
        )
    return Vision(
        encoder=encoder,
        projector=Pooled(side, Norm(encoder.norm.eps)),
        prompt=ImagePrompt(
            tag="<start_of_image>",
            before="\n\n<start_of_image>",
            after="<end_of_image>\n\n",
            token="<image_soft_token>",
        ),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        token=c.integer("image_token_index", c.integer("image_token_id", 262_144)),
        mutual=True,
        pan_and_scan=PanAndScan(
            smallest=256,
            crops=4,
            ratio=1.2,
            before="Here is the original image ",
            between=" and here are some crops to help you see better ",
            separator=" ",
        ),
    )


def _sources(vision: Vision, encoder: Encoder, hidden: int) -> Sources:
    sources: Sources = {}
    for p in vision_parameters(vision, hidden):
        name = f"{p.part}.{p.kind}"
        if p.layer is not None:
            source = Source(f"{_SIGLIP}.encoder.layers.{p.layer}.{VISION_LAYER[p.part]}.{p.kind}")
        elif name == "patches.weight":
            source = Source(_NAMES[name], stored=(encoder.hidden, 3, encoder.patch, encoder.patch))
        else:
            source = Source(
                _NAMES[name],
                add=1.0 if name == "join_norm.weight" else 0.0,
                transposed=name == "join.weight",
            )
        sources[p.name] = source
    return sources
