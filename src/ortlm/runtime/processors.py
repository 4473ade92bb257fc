"""Logits processors: pure functions from history and logits to logits.

History is int64 [B, T], rows that are shorter padded on the right with -1. Logits are float32 [B, V].
A processor never changes what it is given. -inf means that a token cannot be taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.settings import Settings

History = NDArray[np.int64]
Logits = NDArray[np.float32]
Processor = Callable[[History, Logits], Logits]

_NEVER = np.float32(-np.inf)


def from_settings(settings: Settings, *, unknown_ids: NDArray[np.int64] | None = None) -> list[Processor]:
    """Return the processors that ``settings`` ask for, in the order in which they must run."""
    found: list[Processor] = []
    # First, so that no later step gives probability to ids without a token.
    if unknown_ids is not None and len(unknown_ids):
        found.append(forbid(unknown_ids))
    # On unscaled logits: the penalty divides, so it would act twice as hard at temperature 0.5.
    if settings.repetition_penalty not in (None, 1.0):
        found.append(repetition_penalty(settings.repetition_penalty))
    if settings.samples:
        # Hugging Face's order: top_p must see the probabilities that are sampled, among the top k.
        if settings.temperature not in (None, 1.0):
            found.append(temperature(settings.temperature))
        if settings.top_k:
            found.append(top_k(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1:
            found.append(top_p(settings.top_p))
    return found


def forbid(ids: NDArray[np.int64]) -> Processor:
    """Never take these tokens."""

    def process(history: History, logits: Logits) -> Logits:
        out = logits.copy()
        out[:, ids] = _NEVER
        return out

    return process


def repetition_penalty(penalty: float) -> Processor:
    """Divide positive logits of tokens that occurred by ``penalty`` and multiply negative ones with it.

    Source: https://arxiv.org/abs/1909.05858, section 4.1.
    """

    def process(history: History, logits: Logits) -> Logits:
        out = logits.copy()
        for row, past in zip(out, history, strict=True):
            seen = past[past >= 0]
            scores = row[seen]
            row[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
        return out

    return process


# Below this, dividing a float32 logit could overflow.
_TINY = 1e-30


def temperature(value: float) -> Processor:
    """Divide logits by ``value``: below 1 sharpens, above 1 flattens."""

    def process(history: History, logits: Logits) -> Logits:
        if value >= _TINY:
            return logits / np.float32(value)
        # The limit of ever smaller temperatures: only the likeliest are left, and nothing overflows.
        return np.where(logits == logits.max(axis=1, keepdims=True), np.float32(0), _NEVER)

    return process


def top_k(k: int) -> Processor:
    """Keep the k highest logits, and those equal to the lowest of them."""

    def process(history: History, logits: Logits) -> Logits:
        size = logits.shape[1]
        if k >= size:
            return logits
        least = np.partition(logits, size - k, axis=1)[:, size - k, None]
        return np.where(logits < least, _NEVER, logits)

    return process


def top_p(p: float) -> Processor:
    """Keep the smallest set of likeliest tokens whose probabilities reach ``p``; at least one token.

    Exact for any vocabulary: a token stays if those likelier than it hold less than ``p`` together.
    Source: https://arxiv.org/abs/1904.09751.
    """

    def process(history: History, logits: Logits) -> Logits:
        out = np.full_like(logits, _NEVER)
        for row, kept in zip(logits, out, strict=True):
            ids = _nucleus(row, p)
            kept[ids] = row[ids]
        return out

    return process


def _nucleus(row: NDArray[np.float32], p: float) -> NDArray[np.int64]:
    # Partitioning is slow among many equal values, such as what top_k leaves at -inf.
    finite = np.flatnonzero(row > _NEVER)
    weights = np.exp(row[finite] - row.max())
    total = weights.sum(dtype=np.float64)
    # The nucleus is nearly always small: sort a few, and more only while they do not reach p.
    count = min(256, len(weights))
    while True:
        top = np.argpartition(weights, len(weights) - count)[len(weights) - count :]
        if count == len(weights) or weights[top].sum(dtype=np.float64) >= p * total:
            break
        count = min(8 * count, len(weights))
    top = top[np.argsort(-weights[top], kind="stable")]
    before = np.cumsum(weights[top], dtype=np.float64) - weights[top]
    return finite[top[: max(1, int(np.searchsorted(before, p * total, side="left")))]]
