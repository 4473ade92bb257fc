"""Qwen3-VL, text part: Qwen3, whose three positions are one where there is text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures import qwen
from ortlm.architectures._keys import WithDefaults
from ortlm.architectures._rope import keys_of
from ortlm.architectures._text_part import text_only, text_part
from ortlm.spec import Architecture

MODEL_TYPES = ("qwen3_vl",)

_QWEN2 = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_window_layers": 80}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of the text decoder."""
    return text_only(decoder_with_one_position(config))


def decoder_with_one_position(config: Mapping[str, Any]) -> Architecture:
    """Return the decoder of a Qwen2.5-VL or Qwen3-VL, as if each token had one position.

    Older files of Qwen2.5-VL have its keys next to the others.
    """
    inner, fixed = text_part(config, tied=False)
    third = config["model_type"] == "qwen3_vl"
    if third:
        inner.refuse("use_sliding_window", "transformers knows no window in this family")
    keys = keys_of(inner)
    keys.ignore("mrope_section", "mrope_interleaved")
    rope: Mapping[str, Any] = keys.values
    if keys.text("rope_type", keys.text("type", "default")) == "mrope":
        rope = WithDefaults(rope, {}, fixed={"rope_type": "default"})
    inner.ignore("rope_parameters", "rope_scaling")
    values = WithDefaults(
        inner.values,
        {"rope_theta": 5e5} if third else _QWEN2,
        fixed={
            **fixed,
            "model_type": "qwen3" if third else "qwen2",
            "rope_scaling": rope,
            "rope_parameters": None,
        },
    )
    return qwen.describe(values)
