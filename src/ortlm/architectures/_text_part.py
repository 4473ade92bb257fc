"""The text decoder of a multimodal model: it is built alone, and the build says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.spec import Architecture

# What does not belong to the decoder, under the prefixes that checkpoints use.
_OTHERS = (
    "visual",
    "vision_tower",
    "multi_modal_projector",
    "embed_tokens_extend",
    "audio_tower",
    "embed_vision",
)
_IGNORED = tuple(f"{prefix}{part}.*" for part in (*_OTHERS, "embed_audio") for prefix in ("", "model."))
_KEYS = (
    "vision_config", "audio_config", "vision_feature_layer", "vision_feature_select_strategy",
    "spatial_merge_size", "multimodal_projector_bias", "projector_hidden_act", "image_token_index",
    "vision_soft_tokens_per_image", "audio_soft_tokens_per_image",
)  # fmt: skip


def text_part(config: Mapping[str, Any], *, tied: bool) -> tuple[Config, dict[str, bool]]:
    """Return the keys of the text decoder, nested or not, and whether its head is tied, as ``config.json`` has it.

    It may be said of the whole model, where ``tied`` is what an absent key means, or of its text part.
    """
    c = Config(config)
    c.ignore(*_KEYS)
    inner = c.part("text_config")
    if inner is None:
        return c, {"tie_word_embeddings": c.flag("tie_word_embeddings", tied)}
    inside = inner.flag("tie_word_embeddings", False)
    return inner, {"tie_word_embeddings": c.flag("tie_word_embeddings", tied) or inside}


def text_only(found: Architecture) -> Architecture:
    """Return the decoder that ``found`` describes, whose checkpoint holds other parts too."""
    note = (
        "Only the text decoder of this model is built: encoders of images and audio, and adapters for them, "
        "are left out."
    )
    return replace(found, ignored=(*found.ignored, *_IGNORED), notes=(*found.notes, note))
