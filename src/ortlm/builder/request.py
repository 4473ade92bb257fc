"""What a build is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ortlm.builder.options import BuildOptions


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """A model, and what to make of it.

    ``source`` is a folder or a model's name on the Hugging Face hub, ``name`` what a folder's model is called on
    the hub, if it is there; downloads go to ``cache``. ``precision`` is int4, int8, fp16, bf16 or fp32, ``target``
    cpu, cuda, dml, webgpu or mobile. ``adapters`` are folders of peft LoRA adapters by the name under which a
    runtime switches to them; the one in ``merge_adapter`` becomes part of the weights. With ``dtype``, such as
    "q4f16", it is a graph of that dtype for transformers.js, which says precision and target, too. Nothing is
    checked here.
    """

    source: str | Path
    precision: str = "int4"
    target: str = "cpu"
    options: BuildOptions = field(default_factory=BuildOptions)
    name: str | None = None
    cache: str | Path | None = None
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    merge_adapter: str | Path | None = None
    dtype: str | None = None
