"""What a build is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ortlm.builder.options import BuildOptions

# Adapters to merge: a folder, or several, each perhaps with a number that it is multiplied by.
MergeAdapter = str | Path | Sequence[str | Path | tuple[str | Path, float]] | None


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """A model, and what to make of it.

    ``source`` is a folder or a model's name on the Hugging Face hub, ``name`` what a folder's model is called on
    the hub, if it is there; ``revision`` and ``subfolder`` are those of a model on the hub, and downloads go to
    ``cache``. ``precision`` is int4, int8, fp16, bf16 or fp32, ``target`` cpu, cuda, dml, webgpu or mobile.
    ``adapters`` are folders of peft LoRA adapters by the name under which a runtime switches to them; those in
    ``merge_adapter``, one or several, with a number that each is multiplied by, become part of the weights in
    their order. With ``dtype``, such as "q4f16", it is a graph of that dtype for transformers.js, which says
    precision and target, too. Nothing is checked here.
    """

    source: str | Path
    precision: str = "int4"
    target: str = "cpu"
    options: BuildOptions = field(default_factory=BuildOptions)
    name: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    cache: str | Path | None = None
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    merge_adapter: MergeAdapter = None
    dtype: str | None = None

    @property
    def merged(self) -> list[tuple[str | Path, float]]:
        """The adapters in ``merge_adapter``, each with its number."""
        if self.merge_adapter is None:
            return []
        given = [self.merge_adapter] if isinstance(self.merge_adapter, str | Path) else self.merge_adapter
        return [(one, 1.0) if isinstance(one, str | Path) else (one[0], float(one[1])) for one in given]
