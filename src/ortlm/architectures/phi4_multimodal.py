"""Phi-4-multimodal, text part: Phi-4-mini, with the adapters for images and speech off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import phi3
from ortlm.architectures._config import Config
from ortlm.architectures._text_part import text_only
from ortlm.spec import Architecture, Source

MODEL_TYPES = ("phi4_multimodal", "phi4mm")

_ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of the text decoder; ``phi4mm`` is what the publisher's own code calls it."""
    c = Config(config)
    c.ignore("vision_config", "audio_config", "embd_layer", "img_processor", "audio_processor", "vision_lora")
    c.ignore("speech_lora")
    found = text_only(phi3.describe(config))
    if c.text("model_type") == "phi4_multimodal":
        return found

    def base(name: str, source: Source) -> Source:
        """Return where a matrix lies next to its adapters."""
        if name.split(".")[-2] not in _ADAPTED:
            return source
        return replace(source, tensor=f"{source.tensor.removesuffix('.weight')}.base_layer.weight")

    sources = {name: base(name, source) for name, source in found.sources.items()}
    return replace(found, sources=sources, ignored=(*found.ignored, "*.lora_A.*", "*.lora_B.*"))
