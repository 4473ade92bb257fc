"""Logits processors: pure functions from history and logits to logits.

History is int64 [B, T], rows that are shorter padded on the right with -1; tokens of images are 2**62 and more.
Logits are float32 [B, V]. A processor never changes what it is given. -inf means that a token cannot be taken,
and stays -inf. A row without a possible token, or with NaN, is passed on for the sampler to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import BadOption
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from ortlm.runtime.engine.types import History, Logits, Processor
from ortlm.runtime.sampling.settings import Settings
from ortlm.runtime.sampling.top_k import Ids, Row, largest, possible

_NEVER = np.float32(-np.inf)
# So many tokens are sorted in less time than it takes to look at rows one by one.
_FEW = 1024
_LOWEST = np.finfo(np.float32).min


def from_settings(
    settings: Settings,
    *,
    starts: Sequence[int],
    stop_ids: Collection[int] = (),
    forbidden: NDArray[np.bool_] | None = None,
    guide: Processor | None = None,
    warp: bool = True,
) -> list[Processor]:
    """Return the processors that ``settings`` ask for, in the order in which they must run.

    ``starts[b]`` is the length of row b's prompt, where its answer begins; every call must have as many rows.
    ``forbidden`` bool [V]: ids that are never taken, such as those without a token. ``guide``: masks what
    guidance does not allow. ``warp`` False leaves out what ``warpers`` returns.
    Raises BadOption for bad words that are still texts.
    """
    asked, penalty = settings, settings.repetition_penalty
    shortest = asked.min_length or asked.min_new_tokens
    counted = asked.presence_penalty or asked.frequency_penalty
    steps: list[Processor | None] = [
        # What is forbidden comes first, so that no later step gives probability to it.
        forbid(forbidden) if forbidden is not None else None,
        guide,
        bad_words(asked.bad_words, stop_ids) if asked.bad_words else None,
        min_tokens(asked.min_length or 0, asked.min_new_tokens or 0, starts, stop_ids) if shortest else None,
        suppress(asked.suppress_tokens) if asked.suppress_tokens else None,
        suppress(asked.begin_suppress_tokens, starts) if asked.begin_suppress_tokens else None,
        # Before penalties, as in transformers, so that those see what is added.
        sequence_bias(asked.sequence_bias) if asked.sequence_bias else None,
        # On unscaled logits: the penalty divides, so it would act twice as hard at temperature 0.5.
        repetition_penalty(penalty) if penalty is not None and penalty != 1 else None,
        # After it, because dividing would change what they subtract.
        occurrence_penalty(asked.presence_penalty, asked.frequency_penalty, starts) if counted else None,
        no_repeat_ngram(asked.no_repeat_ngram_size) if asked.no_repeat_ngram_size else None,
        # After all penalties, so that a bias is worth the same whatever was written before.
        logit_bias(asked.logit_bias) if asked.logit_bias else None,
        # A caller's own see the logits of all tokens, before any is filtered out by rank, as in transformers.
        *map(custom, asked.processors),
        *(warpers(settings) if warp else ()),
    ]
    return [step for step in steps if step is not None]


def warpers(settings: Settings) -> list[Processor]:
    """Return what shapes the probabilities, in transformers' order: each sees what those before have left."""
    value, p, mass = settings.temperature, settings.top_p, settings.typical_p
    if not settings.samples:
        return []
    steps = [
        temperature(value) if value is not None and value != 1 else None,
        top_k(settings.top_k) if settings.top_k else None,
        top_p(p) if p is not None and p < 1 else None,
        min_p(settings.min_p) if settings.min_p else None,
        typical_p(mass) if mass is not None and mass < 1 else None,
    ]
    return [step for step in steps if step is not None]


def forbid(forbidden: NDArray[np.bool_]) -> Processor:
    """Never take the tokens where ``forbidden``, bool [V], is true."""

    def process(history: History, logits: Logits) -> Logits:
        return np.where(forbidden, _NEVER, logits)

    return process


def bad_words(words: Sequence[str | Sequence[int]], stop_ids: Collection[int] = ()) -> Processor:
    """Forbid the last token of every word where its other tokens stand before, in the prompt or not.

    A word of a single stop token is passed over, as in transformers: it ends the answer and is not in it.
    Raises BadOption for words that are texts, and when called, for an id outside the vocabulary.
    """
    for word in words:
        if isinstance(word, str):
            raise BadOption(f"the bad word {word!r} needs a tokenizer; give its token ids.")
    ids = [tuple(int(token) for token in word) for word in words]
    ids = [word for word in ids if len(word) > 1 or word[0] not in stop_ids]
    always = [word[0] for word in ids if len(word) == 1]
    longer = [(list(word[:-1]), word[-1]) for word in ids if len(word) > 1]
    longest = max((len(first) for first, _ in longer), default=0)
    everything = [token for word in ids for token in word]

    def process(history: History, logits: Logits) -> Logits:
        _check_ids("bad_words", everything, logits.shape[1])
        out = logits.copy()
        out[:, always] = _NEVER
        for row, past in zip(out, history, strict=True):
            tail = _tokens(past)[-longest:].tolist() if longest else []
            forbidden = [last for first, last in longer if tail[-len(first) :] == first]
            row[forbidden] = _NEVER
        return out

    return process


def min_tokens(
    length: int, new_tokens: int, starts: Sequence[int], stop_ids: Collection[int] = ()
) -> Processor:
    """Forbid the stop tokens while a row has less than ``length`` tokens or ``new_tokens`` in its answer."""
    needed = [max(length, start + new_tokens) for start in starts]
    ends = tuple(stop_ids)

    def process(history: History, logits: Logits) -> Logits:
        short = [len(_tokens(past)) < least for past, least in zip(history, needed, strict=True)]
        if not any(short):
            return logits
        out = logits.copy()
        # A stop token that the model cannot write needs no forbidding.
        out[np.ix_(short, [token for token in ends if token < logits.shape[1]])] = _NEVER
        return out

    return process


def suppress(tokens: Sequence[int], starts: Sequence[int] | None = None) -> Processor:
    """Never take ``tokens``; with ``starts``, not as the first token of an answer, which begins there."""
    ids = np.array(tokens, dtype=np.int64)

    def process(history: History, logits: Logits) -> Logits:
        known = ids[ids < logits.shape[1]]
        out = logits.copy()
        if starts is None:
            out[:, known] = _NEVER
        else:
            first = [len(_tokens(past)) == start for past, start in zip(history, starts, strict=True)]
            out[np.ix_(first, known)] = _NEVER
        return out

    return process


def sequence_bias(biases: Mapping[Sequence[int], float]) -> Processor:
    """Add a number to the logit of the last of some tokens where the others stand before it.

    Raises BadOption when called, for an id outside the vocabulary.
    """
    entries = [(list(tokens[:-1]), tokens[-1], np.float32(bias)) for tokens, bias in biases.items()]
    longest = max(len(before) for before, _, _ in entries)
    everything = [token for tokens in biases for token in tokens]

    def process(history: History, logits: Logits) -> Logits:
        _check_ids("sequence_bias", everything, logits.shape[1])
        added = np.zeros_like(logits)
        for row, past in zip(added, history, strict=True):
            tail = _tokens(past)[-longest:].tolist() if longest else []
            for before, last, bias in entries:
                if not before or tail[-len(before) :] == before:
                    row[last] += bias
        return logits + added

    return process


def repetition_penalty(penalty: float) -> Processor:
    """Divide positive logits of tokens that occurred by ``penalty`` and multiply negative ones with it.

    Source: https://arxiv.org/abs/1909.05858, section 4.1.
    """

    def process(history: History, logits: Logits) -> Logits:
        out = logits.copy()
        for row, past in zip(out, history, strict=True):
            seen = _words(past)
            scores = row[seen].astype(np.float64)
            row[seen] = _narrow(np.where(scores < 0, scores * penalty, scores / penalty))
        return out

    return process


def occurrence_penalty(presence: float, frequency: float, starts: Sequence[int]) -> Processor:
    """Subtract ``presence`` once and ``frequency`` times their number from tokens in the answer.

    Source: https://platform.openai.com/docs/api-reference/chat/create, presence and frequency penalties.
    """
    begins = tuple(starts)

    def process(history: History, logits: Logits) -> Logits:
        out = logits.copy()
        for row, past, start in zip(out, history, begins, strict=True):
            seen, counts = np.unique(_words(_tokens(past)[start:]), return_counts=True)
            row[seen] = _narrow(row[seen] - (presence + frequency * counts))
        return out

    return process


def no_repeat_ngram(size: int) -> Processor:
    """Forbid a token with which the last ``size`` tokens would occur a second time."""

    def process(history: History, logits: Logits) -> Logits:
        out = logits.copy()
        for row, past in zip(out, history, strict=True):
            tokens = _tokens(past)
            places = len(tokens) - size + 1
            if places > 0:
                same = np.ones(places, dtype=np.bool_)
                for at in range(size - 1):
                    same &= tokens[at : at + places] == tokens[places + at]
                row[_words(tokens[size - 1 :][same])] = _NEVER
        return out

    return process


def logit_bias(bias: Mapping[int, float]) -> Processor:
    """Add a number to the logits of tokens: with +inf only such tokens are left, with -inf none.

    A token that is forbidden stays so. Raises BadOption when called, for an id outside the vocabulary.
    """
    ids = np.array(list(bias), dtype=np.int64)
    added = _narrow(np.array(list(bias.values()), dtype=np.float64))
    forced, shifted = ids[added == np.inf], ids[added < np.inf]
    added = added[added < np.inf]

    def process(history: History, logits: Logits) -> Logits:
        _check_ids("logit_bias", ids.tolist(), logits.shape[1])
        out = logits.copy()
        out[:, shifted] += added
        for row in out if len(forced) else ():
            left = forced[row[forced] > _NEVER]
            if len(left):
                kept = row[left]
                # Added, not set: a NaN has to remain visible.
                row += _NEVER
                row[left] = kept
        return out

    return process


def custom(function: Processor) -> Processor:
    """Run a caller's own ``function`` on a copy and check what it returns.

    Its history is read-only. Raises BadOption if the result is no array of floats of the logits' shape.
    """

    def process(history: History, logits: Logits) -> Logits:
        given = history.view()
        given.flags.writeable = False
        # A copy, because functions that change their input in place are common.
        returned: object = function(given, logits.copy())
        name = getattr(function, "__qualname__", type(function).__name__)
        rule = f"must return float logits as a numpy array of shape {logits.shape}"
        if not isinstance(returned, np.ndarray):
            raise BadOption(f"the processor {name} {rule}, but it returned {type(returned).__name__}.")
        if returned.shape != logits.shape or not np.issubdtype(returned.dtype, np.floating):
            raise BadOption(
                f"the processor {name} {rule}, but it returned {returned.dtype} {returned.shape}."
            )
        return _narrow(returned)

    return process


# Beyond these, dividing a float32 logit could overflow, or an infinite divisor would make NaN of -inf.
_TINY, _HUGE = 1e-30, 1e30


def temperature(value: float) -> Processor:
    """Divide logits by ``value``: below 1 sharpens, above 1 flattens."""

    def process(history: History, logits: Logits) -> Logits:
        if value >= _TINY:
            return logits / np.float32(min(value, _HUGE))
        # The limit of ever smaller temperatures: only the most likely are left, and nothing overflows.
        most = np.maximum(logits.max(axis=1, keepdims=True), _LOWEST)
        return np.where(logits >= most, np.float32(0), _NEVER)

    return process


def top_k(k: int) -> Processor:
    """Keep the k highest logits, and those equal to the lowest of them."""

    def process(history: History, logits: Logits) -> Logits:
        return _keep(logits, lambda row: largest(row, k))

    return process


def top_p(p: float) -> Processor:
    """Keep the smallest set of most likely tokens whose probabilities reach ``p``; at least one token.

    Exact for any vocabulary: a token stays if those likelier than it hold less than ``p`` together, and the
    lowest id counts as the most likely among equals. Source: https://arxiv.org/abs/1904.09751.
    """

    def process(history: History, logits: Logits) -> Logits:
        if logits.shape[1] <= _FEW:
            return _nuclei(logits, p)
        return _keep(logits, lambda row: _nucleus(row, p))

    return process


def min_p(p: float) -> Processor:
    """Keep the tokens whose probability is at least ``p`` times that of the most likely.

    Source: https://arxiv.org/abs/2407.01082.
    """
    # Of two probabilities only the difference of their logits matters.
    below = np.float32(math.log(p)) if p else _NEVER

    def process(history: History, logits: Logits) -> Logits:
        least = logits.max(axis=1, keepdims=True) + below
        return np.where(logits < least, _NEVER, logits)

    return process


def typical_p(mass: float) -> Processor:
    """Keep the tokens whose information is nearest to the expected one, until they hold ``mass`` together.

    The information of a token is -log of its probability; all that are equally near are kept.
    Source: https://arxiv.org/abs/2202.00666.
    """

    def process(history: History, logits: Logits) -> Logits:
        return _keep(logits, lambda row: _typical(row, mass))

    return process


def _keep(logits: Logits, choose: Callable[[NDArray[np.float32]], Ids]) -> Logits:
    """Return ``logits`` with -inf for the tokens that are not chosen, row by row."""
    out = np.full_like(logits, _NEVER)
    for row, kept in zip(logits, out, strict=True):
        # NaN is the maximum of all that hold one. There is nothing to choose from such a row.
        ids = choose(row) if np.isfinite(row.max()) else slice(None)
        kept[ids] = row[ids]
    return out


def _nucleus(row: NDArray[np.float32], p: float) -> Ids:
    ids, kept = possible(row)
    weights = kept - kept.max()
    np.exp(weights, out=weights)
    count, least = _cut(kept, weights, p * float(weights.sum(dtype=np.float64)))
    positions = np.flatnonzero(kept >= least)
    if len(positions) > count:
        equal = positions[kept[positions] == least]
        positions = np.setdiff1d(positions, equal[count - len(positions) :], assume_unique=True)
    return positions if ids is None else ids[positions]


def _nuclei(logits: Logits, p: float) -> Logits:
    """Return what ``_keep`` does with ``_nucleus``, all rows at once: sorting few tokens takes next to nothing."""
    tops = logits.max(axis=1, keepdims=True)
    # There is nothing to choose from the others.
    sound = np.isfinite(tops)
    order = np.argsort(-logits, axis=1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(ranked - np.where(sound, tops, np.float32(0)))
    reached = np.cumsum(weights, axis=1, dtype=np.float64)
    gone = np.zeros(logits.shape, dtype=np.bool_)
    # A token goes if those before it have reached p together.
    gone[:, 1:] = reached[:, :-1] >= p * reached[:, -1:]
    out = logits.copy()
    np.put_along_axis(out, order, np.where(gone & sound, _NEVER, ranked), axis=1)
    return out


def _typical(row: NDArray[np.float32], mass: float) -> Ids:
    ids = np.flatnonzero(row > _NEVER)
    information = row.max() - row[ids].astype(np.float64)
    information += np.log(np.exp(-information).sum())
    weights = np.exp(-information)
    near = -np.abs(information - weights @ information)
    kept: Ids = ids[near >= _cut(near, weights, mass)[1]]
    return kept


def _cut(values: Row, weights: Row, mass: float) -> tuple[int, float]:
    """Return how many of the largest ``values`` have ``weights`` that reach ``mass``, and the least of them."""
    # Nearly always few are enough: look at those, and at more only while they do not reach it.
    for count in (256, 4096, len(values)):
        top = largest(values, count)
        if weights[top].sum(dtype=np.float64) >= mass:
            break
    order = top[np.argsort(-values[top])]
    reached = np.cumsum(weights[order], dtype=np.float64)
    fewest = min(int(np.searchsorted(reached, mass, side="left")) + 1, len(order))
    return fewest, float(values[order[fewest - 1]])


def _tokens(past: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one row of history without its padding."""
    return past if len(past) and past[-1] >= 0 else past[: np.count_nonzero(past >= 0)]


def _words(past: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens in one row of history that are words: neither padding nor images."""
    tokens = _tokens(past)
    if len(tokens) and tokens.max() >= FIRST_IMAGE_TOKEN:
        return tokens[tokens < FIRST_IMAGE_TOKEN]
    return tokens


def _narrow(values: NDArray[Any]) -> Logits:
    """Return ``values`` as float32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _check_ids(option: str, ids: Iterable[int], size: int) -> None:
    for token in ids:
        if not 0 <= token < size:
            raise BadOption(f"{option} names token {token}, which is outside the vocabulary 0 … {size - 1}.")
