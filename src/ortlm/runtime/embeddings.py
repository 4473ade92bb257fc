"""Vectors for texts, pooled from a decoder's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import BadOption
from ortlm.runtime.engine.decode_loop import Loop

Pooling = Literal["mean", "last", "first"]
_POOLINGS = ("mean", "last", "first")


def embed(
    loop: Loop, rows: Sequence[Sequence[int]], *, pooling: Pooling, normalize: bool, batch: int
) -> NDArray[np.float32]:
    """Return a vector for each row of token ids, float32 [N, H]; see LanguageModel.embed."""
    if pooling not in _POOLINGS:
        raise BadOption(f"pooling must be one of {', '.join(_POOLINGS)}; found {pooling!r}.")
    if batch < 1:
        raise BadOption(f"batch must be at least 1, found {batch}.")
    if not rows:
        raise BadOption("there is nothing to embed.")
    pooled: dict[int, NDArray[np.float32]] = {}
    # Rows of like length together, so that little is padded.
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for at in range(0, len(order), batch):
        numbers = order[at : at + batch]
        loop.start(len(numbers))
        states = loop.hidden_states([rows[number] for number in numbers])
        for number, state in zip(numbers, states, strict=True):
            pooled[number] = _pooled(state[: len(rows[number])], pooling)
    vectors = np.stack([pooled[number] for number in range(len(rows))])
    if normalize:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors


def _pooled(states: NDArray[np.float32], pooling: Pooling) -> NDArray[np.float32]:
    if pooling == "mean":
        pooled: NDArray[np.float32] = states.mean(axis=0, dtype=np.float64).astype(np.float32)
    else:
        pooled = states[-1 if pooling == "last" else 0].copy()
    return pooled
