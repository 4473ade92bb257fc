"""Which token comes next, and when it is enough."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

import numpy as np

from ortlm.runtime.processors import History, Logits, Processor
from ortlm.runtime.sampler import Sampler, Tokens

FinishReason = Literal["stop", "length"]


class Search(Protocol):
    """A way to choose tokens step by step."""

    @property
    def finished(self) -> bool:
        """Whether no row wants another token."""

    def step(self, logits: Logits) -> Tokens:
        """Take logits float32 [B, V] and return the tokens int64 [B] to feed next."""

    def best(self) -> list[list[int]]:
        """Return the new tokens of every row, stop tokens included."""


class Sampling:
    """One token per row and step: greedy or drawn, after the processors.

    A row that has finished goes on with its last token, which no longer counts.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        processors: Sequence[Processor],
        sampler: Sampler,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
        max_new_tokens: int,
    ) -> None:
        self._processors = processors
        self._sampler = sampler
        self._random = np.random.default_rng(seed)
        self._stop_ids = frozenset(stop_ids)
        self._limit = max_new_tokens
        self._new: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[FinishReason | None] = [None if max_new_tokens > 0 else "length" for _ in prompts]
        longest = max(len(prompt) for prompt in prompts)
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._history = np.full((len(prompts), longest + 64), -1, dtype=np.int64)
        for row, prompt in zip(self._history, prompts, strict=True):
            row[: len(prompt)] = prompt

    @property
    def finished(self) -> bool:
        """Whether no row wants another token."""
        return None not in self.reasons

    @property
    def history(self) -> History:
        """Prompt and new tokens, int64 [B, T], shorter rows padded with -1."""
        return self._history[:, : self._lengths.max()]

    def step(self, logits: Logits) -> Tokens:
        """Take logits float32 [B, V] and return the tokens int64 [B] to feed next."""
        for process in self._processors:
            logits = process(self.history, logits)
        tokens = self._sampler(logits, self._random)
        if self._lengths.max() == self._history.shape[1]:
            self._history = np.pad(self._history, ((0, 0), (0, self._history.shape[1])), constant_values=-1)
        for row, reason in enumerate(self.reasons):
            if reason is not None:
                tokens[row] = self._history[row, self._lengths[row] - 1]
                continue
            token = int(tokens[row])
            self._history[row, self._lengths[row]] = token
            self._lengths[row] += 1
            self._new[row].append(token)
            if token in self._stop_ids:
                self.reasons[row] = "stop"
            elif len(self._new[row]) >= self._limit:
                self.reasons[row] = "length"
        return tokens

    def finish(self, row: int, reason: FinishReason) -> None:
        """End a row for a reason seen from outside, such as a stop text."""
        self.reasons[row] = reason

    def best(self) -> list[list[int]]:
        """Return the new tokens of every row, stop tokens included."""
        return self._new
