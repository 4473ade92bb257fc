"""The models that a server answers with, each with its engine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ortlm.errors import BadOption, nearest
from ortlm.runtime.language_model import LanguageModel
from ortlm.runtime.sampling.settings import Settings
from ortlm.server.errors import ApiError
from ortlm.server.tokens import TokenTexts
from ortlm.server.tools import ToolFormat, tool_format
from ortlm.serving.engine import Engine
from ortlm.serving.request import Request


@dataclass
class ServedModel:
    """A loaded model under its ``name``, and the ``engine`` that answers its requests."""

    name: str
    lm: LanguageModel
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # Read now, since the folder may be deleted while it is served.
        if self.lm.chat_template is not None:
            self.tool_format  # noqa: B018 - its value is kept

    @cached_property
    def texts(self) -> TokenTexts:
        """What each token is as text."""
        return TokenTexts(self.lm.tokenizer)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools, None if its chat template reads none."""
        return (
            None if self.lm.chat_template is None else tool_format(self.lm.chat_template, self.lm.tokenizer)
        )

    @property
    def names(self) -> list[str]:
        """What requests may call it: its name, and with each of its adapters."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.lm.adapters)]

    def submit_all(self, asked: Iterable[tuple[Sequence[int], Settings]], *, priority: int) -> list[Request]:
        """Submit prompts with their settings; if one of them is refused, none is computed."""
        requests: list[Request] = []
        try:
            for ids, settings in asked:
                requests.append(self.engine.submit(ids, settings, priority=priority))
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return requests

    def retry_after(self) -> int:
        """Return after how many seconds a place in the queue may be free."""
        stats = self.engine.stats()
        return max(1, min(60, (stats.waiting + stats.running) // max(1, self.engine.options.batch)))


class Models:
    """All that is served, by name; the first one is meant where there is only that."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self.all: Sequence[ServedModel] = list(models)
        known: dict[str, tuple[ServedModel, str | None]] = {}
        for model in self.all:
            for name in model.names:
                if name in known:
                    raise BadOption(f"two models are called {name!r}. Give one another name: NAME=FOLDER.")
                known[name] = model, name.removeprefix(f"{model.name}:") if name != model.name else None
        self._known = known

    @property
    def names(self) -> list[str]:
        """All names that requests may use."""
        return list(self._known)

    def get(self, name: str | None) -> tuple[ServedModel, str | None]:
        """Return the model and the adapter that ``name`` means. Raises ApiError if there is none."""
        if name is None:
            if len(self.all) == 1:
                return self.all[0], None
            raise ApiError(400, f"model is missing; there is {', '.join(self.names)}.", param="model")
        if name not in self._known:
            said = f"there is no model {name[:200]!r}; there is {', '.join(self.names)}."
            raise ApiError(404, said + nearest(name, self.names), param="model", code="model_not_found")
        return self._known[name]

    def close(self, drain_seconds: float = 0.0) -> None:
        """End all engines; what runs in any of them has ``drain_seconds`` to end."""
        until = time.monotonic() + drain_seconds
        for model in self.all:
            model.engine.stop_taking()
        for model in self.all:
            model.engine.close(drain_seconds=max(0.0, until - time.monotonic()))


def named(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names and folders that ``words`` say: FOLDER, or NAME=FOLDER."""
    found = []
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name, folder = Path(word).resolve().name, word
        if not name or not folder:
            raise BadOption(f"a model is given as FOLDER or NAME=FOLDER; found {word!r}.")
        found.append((name, folder))
    return found
