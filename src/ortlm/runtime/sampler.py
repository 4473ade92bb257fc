"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import Error
from ortlm.runtime.processors import Logits

Tokens = NDArray[np.int64]
Sampler = Callable[[Logits, np.random.Generator], Tokens]


def greedy(logits: Logits, random: np.random.Generator) -> Tokens:
    """Return the likeliest token of every row, int64 [B]; the lowest id among equals."""
    tokens: Tokens = np.argmax(logits, axis=1).astype(np.int64)
    # NaN counts as the largest, so it is what argmax finds.
    chosen = logits[np.arange(len(tokens)), tokens]
    if not (chosen > -np.inf).all():
        raise _nothing_to_choose()
    return tokens


def multinomial(logits: Logits, random: np.random.Generator) -> Tokens:
    """Draw a token of every row by its probability, int64 [B].

    One number of ``random`` is used per row, so a row's tokens depend on the seed alone.
    """
    return np.array(
        [_draw(row, u) for row, u in zip(logits, random.random(len(logits)), strict=True)], np.int64
    )


def _nothing_to_choose() -> Error:
    return Error(
        "the model's logits hold NaN or infinity, so no token can be chosen. Usual cause: fp16 activations that "
        "overflowed, or a damaged model file."
    )


def _draw(row: NDArray[np.float32], u: float) -> int:
    # After top_k or top_p nearly all are -inf, and exp of those few that are left is much faster.
    ids = np.flatnonzero(row > -np.inf)
    if not len(ids) or np.isnan(row).any() or row.max() == np.inf:
        raise _nothing_to_choose()
    kept = row if len(ids) == len(row) else row[ids]
    mass = np.cumsum(np.exp(kept - kept.max()), dtype=np.float64)
    # From the right, so that a token of probability 0 is never met.
    return int(ids[np.searchsorted(mass, u * mass[-1], side="right")])
