"""Mistral Small 3.1 and 3.2, Ministral 3 with images, text part: a Mistral or a Ministral 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures import ministral3, mistral
from ortlm.architectures._keys import WithDefaults
from ortlm.architectures._text_part import text_only, text_part
from ortlm.spec import Architecture

MODEL_TYPES = ("mistral3",)

# What the published text parts leave to transformers' defaults.
_MISTRAL = {"head_dim": 128, "max_position_embeddings": 131_072, "rope_theta": 1e9, "rms_norm_eps": 1e-5}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of the text decoder, which ``text_config`` names."""
    inner, tied = text_part(config, tied=True)
    if inner.text("model_type", "mistral") == "ministral3":
        return text_only(ministral3.describe(WithDefaults(inner.values, {}, fixed=tied)))
    defaults = _MISTRAL if inner.has("sliding_window") else {**_MISTRAL, "sliding_window": None}
    return text_only(mistral.describe(WithDefaults(inner.values, defaults, fixed=tied)))
