"""What the classes for one loaded model share."""

from __future__ import annotations

from dataclasses import dataclass

from ortlm.artifact import GenaiFacts
from ortlm.genai.config import TemporaryFolder
from ortlm.runtime.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """A loaded model and what its configuration said.

    ``folder`` is where parts from memory lie, which must live as long as the model. ``asked`` names the search
    options that an overlay set.
    """

    lm: LanguageModel
    config: GenaiFacts
    folder: TemporaryFolder | None
    asked: frozenset[str]


class HasHandle:
    """What owns a model's handle: Model, for those that must not import it."""

    _handle: ModelHandle
