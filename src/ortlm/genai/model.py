"""A loaded model."""

from __future__ import annotations

from pathlib import Path

from ortlm.genai.config import Config
from ortlm.genai.errors import GenaiError, official
from ortlm.genai.handle import HasHandle, ModelHandle
from ortlm.genai.processor import MultiModalProcessor
from ortlm.runtime.language_model import LanguageModel

# How the official runtime spells devices whose providers are called otherwise.
_DEVICES = {"Dml": "DML", "WebGpu": "WebGPU"}


class Model(HasHandle):
    """The model that a configuration describes, or the one in a folder.

    May be used by several threads, each with its own Generator. Raises GenaiError if it cannot be loaded.
    """

    @official
    def __init__(self, config: Config | str | Path) -> None:
        if not isinstance(config, Config):
            config = Config(config)
        facts = config._facts()
        artifact, folder = config._artifact()
        lm = LanguageModel(artifact, device=config._device())
        self._handle = ModelHandle(lm, facts, folder, frozenset(config._asked))

    @property
    def type(self) -> str:
        """The model type that the configuration names, such as "phi3"."""
        return self._handle.config.model_type

    @property
    def device_type(self) -> str:
        """Where the model runs, such as "CPU" or "CUDA"."""
        first = self._handle.lm.device.provider.removesuffix("ExecutionProvider")
        return _DEVICES.get(first, first)

    def create_multimodal_processor(self) -> MultiModalProcessor:
        """Return what turns prompts with images into inputs. Raises GenaiError for a text model."""
        return MultiModalProcessor(self)

    def create_streaming_processor(self) -> None:
        """Speech models are not supported: raises GenaiError."""
        raise GenaiError(f"a {self.type} model takes text only; models of speech are not supported.")
