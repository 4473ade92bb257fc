"""When an answer ends, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.generation.batch import TokenRows
from ortlm.runtime.sampling.settings import Settings

FinishReason = Literal["stop", "length", "cancelled"]


def answer_limit(settings: Settings, *, prompt_tokens: int, context_tokens: int) -> int:
    """Return how many tokens an answer to ``prompt_tokens`` tokens may have in a context of ``context_tokens``."""
    # The last token that fits is generated, but never fed.
    limit = context_tokens - prompt_tokens + 1
    if settings.max_length is not None:
        limit = min(limit, settings.max_length - prompt_tokens)
    if settings.max_new_tokens is not None:
        limit = min(limit, settings.max_new_tokens)
    return max(0, limit)


class FinishReasons:
    """Why each of ``count`` rows ended, None for those that continue."""

    def __init__(self, count: int = 0) -> None:
        self._reasons: list[FinishReason | None] = [None] * count

    def __len__(self) -> int:
        return len(self._reasons)

    def __iter__(self) -> Iterator[FinishReason | None]:
        return iter(self._reasons)

    def __getitem__(self, row: int) -> FinishReason | None:
        return self._reasons[row]

    def __setitem__(self, row: int, reason: FinishReason | None) -> None:
        self._reasons[row] = reason

    @property
    def ended(self) -> list[int]:
        """The rows that have ended."""
        return [row for row, reason in enumerate(self._reasons) if reason is not None]

    @property
    def all_ended(self) -> bool:
        """Whether no row continues."""
        return None not in self._reasons

    def select(self, rows: NDArray[np.int64]) -> None:
        """Keep those of ``rows``, int64 [B], in this order; a row may be taken more than once."""
        self._reasons = [self._reasons[row] for row in rows]

    def after_step(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        limits: Sequence[int],
        *,
        stop_ids: Collection[int],
        is_complete: Callable[[int], bool],
    ) -> None:
        """End the rows whose new one of ``tokens`` does: a stop token, the last one of the row's limit.

        ``lengths`` are those of the answers, with it. Without ``stop_ids`` an answer whose form ``is_complete``
        ends too. Rows that have ended already stay as they are.
        """
        reasons = self._reasons
        for row, (token, length, limit) in enumerate(zip(tokens, lengths, limits, strict=True)):
            if reasons[row] is not None:
                continue
            if token in stop_ids:
                reasons[row] = "stop"
            elif length >= limit:
                reasons[row] = "length"
            elif not stop_ids and is_complete(row):
                reasons[row] = "stop"

    def end_spent(self, rows: TokenRows, limits: Sequence[int]) -> None:
        """End those of ``rows`` whose answers have as many tokens as their ``limits`` allow."""
        for row, reason in enumerate(self._reasons):
            if reason is None and rows.lengths[row] and rows.answer_length(row) >= limits[row]:
                self._reasons[row] = "length"

    def reopen_unspent(self, rows: TokenRows, limits: Sequence[int]) -> bool:
        """Let those of ``rows`` continue that ended by length and have room again; return whether any do."""
        reopened = [
            row
            for row, reason in enumerate(self._reasons)
            if reason == "length" and rows.answer_length(row) < limits[row]
        ]
        for row in reopened:
            self._reasons[row] = None
        return bool(reopened)
