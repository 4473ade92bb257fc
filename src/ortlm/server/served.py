"""A loaded model with its engine: what requests work on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ortlm.errors import BadArtifact
from ortlm.runtime.language_model import LanguageModel
from ortlm.runtime.sampling.settings import Settings
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

    def __post_init__(self) -> None:
        # Read now, since the folder may be deleted while it is served.
        with contextlib.suppress(BadArtifact):
            # Without a tokenizer there is none.
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
