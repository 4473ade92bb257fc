"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import BadOption, Error
from ortlm.runtime.engine.types import Logits, Processor, Tokens
from ortlm.runtime.sampling.top_k import Ids, largest, largest_each, possible

Probabilities = NDArray[np.float64]
Randoms = Sequence["np.random.Generator"]
Sampler = Callable[[Logits, Randoms], Tokens]

# Tokens whose probabilities are summed before the one that is drawn is looked for among them.
_BLOCK = 512


def greedy(logits: Logits, randoms: Randoms = (), *, forbidden: NDArray[np.bool_] | None = None) -> Tokens:
    """Return the most likely token of every row, int64 [B]; the lowest id among equals.

    ``forbidden`` bool [V] are tokens that are never taken.
    """
    tokens: Tokens = np.argmax(logits, axis=1).astype(np.int64)
    if forbidden is not None and forbidden[tokens].any():
        # They seldom win, so that it is cheaper to look for the winner twice than to bar them first.
        logits = np.where(forbidden, np.float32(-np.inf), logits)
        tokens = np.argmax(logits, axis=1).astype(np.int64)
    # NaN counts as the largest, so it is what argmax finds.
    chosen = logits[np.arange(len(tokens)), tokens]
    if not (chosen > -np.inf).all():
        raise nothing_to_choose()
    return tokens


def multinomial(logits: Logits, randoms: Randoms) -> Tokens:
    """Draw a token of every row by its probability, int64 [B].

    Row b takes one number of ``randoms[b]``, so its tokens depend on its own seed and logits alone.
    """
    return np.array([_draw(row, random) for row, random in zip(logits, randoms, strict=True)], np.int64)


def draw_among(
    logits: Logits,
    randoms: Randoms,
    *,
    count: int,
    warpers: Sequence[Processor],
    forbidden: NDArray[np.bool_] | None = None,
) -> Tokens:
    """Draw a token of every row among its ``count`` most likely after ``warpers``, int64 [B].

    That is what top_k, the warpers and ``multinomial`` do one after the other, but the warpers see those few
    tokens only: with a large vocabulary, each pass over all of it takes longer than all the rest.
    ``forbidden`` bool [V] are tokens that are never taken.
    """
    if not np.isfinite(logits.max(axis=1)).all():
        raise nothing_to_choose()
    ids = largest_each(logits, count)
    if ids is not None and not (forbidden is not None and forbidden[ids].any()):
        return _draw_few(np.take_along_axis(logits, ids, axis=1), ids, randoms, warpers)
    tokens = np.zeros(len(logits), dtype=np.int64)
    for at, (row, random) in enumerate(zip(logits, randoms, strict=True)):
        few = largest(row, count)
        if forbidden is not None and forbidden[few].any():
            row = np.where(forbidden, np.float32(-np.inf), row)
            few = largest(row, count)
        tokens[at] = _draw_few(row[few][None], few[None], [random], warpers)[0]
    return tokens


def _draw_few(few: Logits, ids: Ids, randoms: Randoms, warpers: Sequence[Processor]) -> Tokens:
    """Draw one of ``ids`` int64 [B, n] for every row by its logits ``few`` [B, n] after ``warpers``."""
    none = np.zeros((len(few), 0), dtype=np.int64)
    for warp in warpers:
        few = warp(none, few)
    tops = few.max(axis=1, keepdims=True)
    if not np.isfinite(tops).all():
        raise nothing_to_choose()
    weights = np.exp(few - tops)
    ends = np.cumsum(weights, axis=1, dtype=np.float64)
    shares = np.array([random.random() for random in randoms])
    # Below the end, so that a token of probability 0 is never met.
    targets = np.minimum(shares * ends[:, -1], np.nextafter(ends[:, -1], 0))
    places = (ends <= targets[:, None]).sum(axis=1)
    tokens: Tokens = ids[np.arange(len(ids)), places]
    return tokens


def probabilities(logits: NDArray[np.float32]) -> Probabilities:
    """Return the probability of every token, float64 [V], given one row of processed logits [V]."""
    top = logits.max()
    if not np.isfinite(top):
        raise nothing_to_choose()
    out = logits.astype(np.float64)
    out -= top
    np.exp(out, out=out)
    out /= out.sum()
    return out


def accept(
    token: int,
    draft: Probabilities | None,
    logits: NDArray[np.float32],
    random: np.random.Generator,
) -> tuple[int, bool]:
    """Keep the drafted ``token`` or draw another, so that the result is distributed as the model's own.

    ``draft`` are the probabilities float64 [V] from which the token was drawn; None if it was not drawn but
    is all that the draft proposes. ``logits`` [V] are the model's own, processed. Returns the token and
    whether it is the drafted one by acceptance: with probability min(1, p / q); what is drawn otherwise
    follows max(p - q, 0). Raises BadOption for drafts of another size or a token that could not be drawn.
    Source: https://arxiv.org/abs/2211.17192, section 2.3.
    """
    model = probabilities(logits)
    if draft is not None and draft.shape != model.shape:
        raise BadOption(
            f"the draft's probabilities have shape {draft.shape}, the model's {model.shape}. "
            "Bring both to the model's vocabulary first."
        )
    q = 1.0 if draft is None else float(draft[token])
    if not q > 0:
        raise BadOption(f"token {token} has probability {q} in the draft from which it was drawn.")
    if random.random() * q < model[token]:
        return token, True
    rest = model if draft is None else np.maximum(model - draft, 0)
    if draft is None:
        rest[token] = 0
    # Both are equal but for rounding if nothing is left; then p itself is as good.
    return _pick(rest if rest.any() else model, random.random()), False


def nothing_to_choose() -> Error:
    """Return the error for logits from which no token can be taken."""
    return Error(
        "the model's logits hold NaN or infinity, so no token can be chosen. Usual cause: fp16 activations that "
        "overflowed, or a damaged model file; or settings that together forbid every token."
    )


def _draw(row: NDArray[np.float32], random: np.random.Generator) -> int:
    top = row.max()
    # NaN is the maximum of all that hold one.
    if not np.isfinite(top):
        raise nothing_to_choose()
    ids, kept = possible(row)
    weights = kept - top
    np.exp(weights, out=weights)
    position = _pick(weights, random.random())
    return position if ids is None else int(ids[position])


def _pick(weights: NDArray[np.float32] | Probabilities, u: float) -> int:
    """Return the position at which the running sum of ``weights`` exceeds the share ``u`` in [0, 1) of all."""
    # Running sums of blocks only: those of a whole vocabulary take several times as long as its exponentials.
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    ends = np.cumsum(blocks)
    target = u * ends[-1]
    # From the right, so that a block or a token of probability 0 is never met.
    block = int(np.searchsorted(ends, target, side="right"))
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    # A block's sum and the last of its running sums may differ in rounding.
    left = min(target - (ends[block] - blocks[block]), np.nextafter(inside[-1], 0))
    return block * _BLOCK + int(np.searchsorted(inside, left, side="right"))
