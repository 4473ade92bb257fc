"""Two models read the same chunks in lockstep; what they say of each scored token becomes numbers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ortlm.dtypes import Floats
from ortlm.errors import BadArtifact, BadCheckpoint, BadOption
from ortlm.evaluation.chunks import Chunks
from ortlm.evaluation.statistics import Doubles, Scores
from ortlm.evaluation.types import Source, Tokens

# Bounds the float64 copies of logits.
_BLOCK_NUMBERS = 1 << 21
_WORST = 20
_TOP = 5


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A scored token: after position ``at`` of chunk ``chunk``, with the most likely tokens of both models.

    ``base_top`` and ``top`` are pairs of a token and its probability, from the most likely.
    """

    chunk: int
    at: int
    kld: float
    delta_p: float
    base_top: tuple[tuple[int, float], ...]
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of all tokens in order, the part of the text that each belongs to [N], and the worst places."""

    scores: Scores
    kinds: Tokens
    worst: tuple[WorstToken, ...]


def compare(
    model: Source, base: Source, chunks: Chunks, advance: Callable[[int], None] = lambda count: None
) -> Comparison:
    """Return the comparison of two sources that are open on ``chunks``; ``advance`` counts chunks.

    Raises BadOption if their vocabularies differ, BadArtifact or BadCheckpoint for logits that are no numbers.
    """
    parts: list[Scores] = []
    worst: list[WorstToken] = []
    for number, ids in enumerate(chunks.tokens):
        # The last logits predict what is not in the chunk.
        wanted = slice(chunks.first, len(ids) - 1)
        base_logits = _checked(base.logits(number), BadCheckpoint, "the reference", number)[wanted]
        logits = _checked(model.logits(number), BadArtifact, "the artifact", number)[wanted]
        if logits.shape != base_logits.shape:
            raise BadOption(
                f"the artifact has a vocabulary of {logits.shape[-1]} tokens and the reference one of "
                f"{base_logits.shape[-1]}: these are different models. Give the one that it was built from."
            )
        scores = score(logits, base_logits, ids[chunks.first + 1 :])
        parts.append(scores)
        least = worst[-1].kld if len(worst) == _WORST else -1.0
        worst = _worst([*worst, *_places(number, chunks.first, scores, logits, base_logits, least)])
        advance(1)
    return Comparison(
        _joined(parts),
        np.concatenate([kinds[chunks.first + 1 :] for kinds in chunks.kinds]),
        tuple(worst),
    )


def joined(parts: Sequence[tuple[int, Comparison]]) -> Comparison:
    """Return the comparison of all chunks from those of some, each with the number of its first, in order."""
    scores = [part.scores for _, part in parts]
    worst = [replace(place, chunk=place.chunk + first) for first, part in parts for place in part.worst]
    return Comparison(
        _joined(scores), np.concatenate([part.kinds for _, part in parts]), tuple(_worst(worst))
    )


def score(logits: Floats, base_logits: Floats, targets: Tokens) -> Scores:
    """Return the scores of ``targets`` [N] by the logits [N, V] before them.

    The KL divergence is that of the model from the reference: Σ p ln(p/q) over the vocabulary, p the reference's.
    """
    count, vocab = logits.shape
    nll, base_nll, kld = (np.empty(count) for _ in range(3))
    step = max(1, _BLOCK_NUMBERS // vocab)
    for low in range(0, count, step):
        rows = slice(low, low + step)
        ln_q, ln_p = log_softmax(logits[rows]), log_softmax(base_logits[rows])
        each, wanted = np.arange(len(ln_q)), targets[rows]
        nll[rows], base_nll[rows] = -ln_q[each, wanted], -ln_p[each, wanted]
        kld[rows] = (np.exp(ln_p) * (ln_p - ln_q)).sum(axis=1)
    same = logits.argmax(axis=1) == base_logits.argmax(axis=1)
    # Of equal distributions, rounding leaves something of either sign.
    return Scores(nll, base_nll, np.maximum(kld, 0.0), same)


def log_softmax(logits: Floats) -> Doubles:
    """Return the logarithms of the probabilities, float64 [N, V]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def most_likely(logits: Floats) -> tuple[tuple[int, float], ...]:
    """Return the five most likely tokens of ``logits`` [V] with their probabilities."""
    count = min(_TOP, len(logits))
    tokens = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    # Equal logits in the order of their tokens, whatever the sorting does.
    order = tokens[np.lexsort((tokens, -logits[tokens]))][:count]
    p = np.exp(log_softmax(logits[None])[0])
    return tuple((int(token), float(p[token])) for token in order)


def _checked(logits: Floats, error: type[BadArtifact] | type[BadCheckpoint], what: str, chunk: int) -> Floats:
    if not np.isfinite(logits).all():
        raise error(
            f"{what} gives logits that are no finite numbers in chunk {chunk}, so it is damaged, or overflows in "
            "its element type. Compare with another precision, and check the checkpoint."
        )
    return logits


def _places(
    number: int, first: int, scores: Scores, logits: Floats, base_logits: Floats, least: float
) -> list[WorstToken]:
    """Return the worst places of a chunk, as far as their KL divergence is above ``least``."""
    rows = np.lexsort((np.arange(len(scores.kld)), -scores.kld))[:_WORST].tolist()
    return [
        WorstToken(
            chunk=number,
            at=first + row,
            kld=float(scores.kld[row]),
            delta_p=float(scores.delta_p[row]),
            base_top=most_likely(base_logits[row]),
            top=most_likely(logits[row]),
        )
        for row in rows
        if scores.kld[row] > least
    ]


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(
        nll=np.concatenate([part.nll for part in parts]),
        base_nll=np.concatenate([part.base_nll for part in parts]),
        kld=np.concatenate([part.kld for part in parts]),
        same_top=np.concatenate([part.same_top for part in parts]),
    )


def _worst(places: list[WorstToken]) -> list[WorstToken]:
    return heapq.nsmallest(_WORST, places, key=lambda place: (-place.kld, place.chunk, place.at))
