"""Log-probabilities of tokens, from the model's logits before any processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import BadOption
from ortlm.runtime.engine.types import Logits
from ortlm.runtime.sampling.sampler import nothing_to_choose
from ortlm.runtime.sampling.top_k import descending, largest


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural ``logprob`` of ``token_id``, and in ``top`` the most likely ids with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: NDArray[np.float32], token_id: int, top: int = 0) -> TokenLogprob:
    """Return the log-probability of ``token_id`` and of the ``top`` most likely tokens, by raw logits [V].

    Computed in float64. Among equals the lowest id comes first. ``top`` above V gives all V.
    Raises BadOption for an id outside the vocabulary, Error for logits that hold NaN or +inf.
    """
    if not 0 <= token_id < len(logits):
        raise BadOption(f"token id {token_id} is outside the vocabulary 0 … {len(logits) - 1}.")
    at = int(np.argmax(logits))
    peak = float(logits[at])
    if not math.isfinite(peak):
        raise nothing_to_choose()
    weights = logits.astype(np.float64)
    weights -= peak
    np.exp(weights, out=weights)
    # The most likely apart, whose weight is 1: next to it, the digits of a sharp distribution would be lost.
    weights[at] = 0
    total = math.log1p(float(weights.sum()))

    def logprob(token: int) -> float:
        return float(logits[token]) - peak - total

    ids = descending(logits, largest(logits, top))[:top].tolist() if top else []
    return TokenLogprob(token_id, logprob(token_id), tuple((token, logprob(token)) for token in ids))


def prompt_logprobs(logits: Logits, ids: Sequence[int], top: int = 0) -> list[TokenLogprob | None]:
    """Return a TokenLogprob for every token of a prompt, None for the first, which nothing precedes.

    ``logits`` are raw, [S, V]: row s follows token s. The row after the last token may be left out.
    Raises BadOption if there are more or fewer rows, and as ``token_logprob``.
    """
    if len(logits) not in (len(ids), len(ids) - 1):
        raise BadOption(f"{len(ids)} tokens need as many rows of logits, or one fewer; found {len(logits)}.")
    after = zip(logits[: max(len(ids) - 1, 0)], ids[1:], strict=True)
    logprobs: list[TokenLogprob | None] = [token_logprob(row, int(token), top) for row, token in after]
    return [None, *logprobs] if len(ids) else []
