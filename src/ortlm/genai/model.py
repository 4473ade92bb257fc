"""A loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ortlm.artifact import genai_providers
from ortlm.genai.config import Config
from ortlm.genai.errors import GenaiError, official
from ortlm.runtime.generate import LanguageModel

if TYPE_CHECKING:
    from ortlm.genai.processor import MultiModalProcessor

# How the official runtime spells devices whose providers are called otherwise.
_DEVICES = {"Dml": "DML", "WebGpu": "WebGPU"}


class Model:
    """The model that a configuration describes, or the one in a folder.

    May be used by several threads, each with its own Generator. Raises GenaiError if it cannot be loaded.
    """

    @official
    def __init__(self, config: Config | str | Path) -> None:
        if not isinstance(config, Config):
            config = Config(config)
        self._facts = config._facts()
        # The folder of a model with parts from memory must live as long as the model.
        artifact, self._folder = config._artifact()
        self._asked = frozenset(config._asked)
        self._lm = LanguageModel(artifact, providers=genai_providers(self._facts, config._published) or None)

    @property
    def type(self) -> str:
        """The model type that the configuration names, such as "phi3"."""
        return self._facts.model_type

    @property
    def device_type(self) -> str:
        """Where the model runs, such as "CPU" or "CUDA"."""
        first = self._lm.session.providers[0].removesuffix("ExecutionProvider")
        return _DEVICES.get(first, first)

    def create_multimodal_processor(self) -> MultiModalProcessor:
        """Return what turns prompts with images into inputs. Raises GenaiError for a model of text."""
        # It needs this module for its tokenizer.
        from ortlm.genai.processor import MultiModalProcessor

        return MultiModalProcessor(self)

    def create_streaming_processor(self) -> None:
        """Speech models are not supported: raises GenaiError."""
        raise GenaiError(f"a {self.type} model takes text only; models of speech are not supported.")
