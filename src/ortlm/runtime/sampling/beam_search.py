"""Beam search: the most likely whole continuations, several kept side by side.

Rules are those of ``transformers.generate``. Processors work on log-probabilities, a beam's score is the sum of
what they return, and a finished continuation ranks by its score / length ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import Error
from ortlm.runtime.engine.types import History, Logits, Processor, Tokens
from ortlm.runtime.sampling.settings import Settings

Scores = NDArray[np.float32]

_NEVER = np.float32(-np.inf)
_RANGE = np.finfo(np.float32)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A continuation: its new tokens, and the score by which it is ranked.

    ``stopped``: the last token is a stop token. Otherwise the limit, or the caller, ended it.
    """

    tokens: tuple[int, ...]
    score: float
    stopped: bool


class Beams:
    """Beam search for several prompts at once; row p * num_beams + k is beam k of prompt p.

    ``starts`` and ``limits`` are the length of each prompt and how many new tokens it may get, ``randoms`` a
    generator for each, which is drawn from if the settings sample. ``processors`` get all rows at every call;
    others may be assigned between two steps.

    With ``num_beam_groups`` the groups of a prompt choose one after the other, and what earlier ones have just
    chosen becomes less likely (https://arxiv.org/abs/1610.02424). These searches end by the rules of
    transformers 4, where they come from: see ``_Search``.
    """

    def __init__(
        self,
        *,
        prompts: int,
        settings: Settings,
        stop_ids: Collection[int],
        starts: Sequence[int],
        limits: Sequence[int],
        processors: Sequence[Processor],
        randoms: Sequence[np.random.Generator],
    ) -> None:
        self.processors = processors
        self.rows = prompts * settings.num_beams
        self._settings = settings
        self._size = settings.num_beams // settings.num_beam_groups
        ends = np.array(sorted(stop_ids), dtype=np.int64)
        each = zip(range(prompts), starts, limits, randoms, strict=True)
        self._searches = [
            [_Search(settings, ends, start, limit, random) for _ in range(settings.num_beam_groups)]
            for _, start, limit, random in each
        ]

    @property
    def ended(self) -> list[bool]:
        """Whether the search is over, prompt by prompt: its results change no more."""
        return [all(search.done for search in groups) for groups in self._searches]

    @property
    def finished(self) -> bool:
        """Whether the search is over for every prompt."""
        return all(self.ended)

    def step(self, history: History, logits: Logits) -> tuple[Tokens, Tokens]:
        """Return the next tokens and the rows that they continue, both int64 [rows].

        ``history`` is int64 [rows, T], prompts included, rows padded on the right with -1; ``logits`` are
        float32 [rows, V]. The caller has to reorder its rows by the second array and append the first. Rows of
        a prompt whose search is over continue themselves, with tokens that mean nothing.
        Raises Error if the logits are no numbers or no token may be taken.
        """
        tokens = np.zeros(self.rows, dtype=np.int64)
        parents = np.arange(self.rows)
        log_probs = _log_softmax(logits)
        taken: list[list[int]] = [[] for _ in self._searches]
        for group in range(self._settings.num_beam_groups):
            scores = self._less_likely(log_probs, taken) if group else log_probs
            for process in self.processors:
                scores = process(history, scores)
            for prompt, searches in enumerate(self._searches):
                search, rows = searches[group], self._beams(prompt, group)
                if not search.done:
                    tokens[rows], beams = search.step(history[rows], scores[rows])
                    parents[rows] = rows.start + beams
                    taken[prompt] += tokens[rows].tolist()
        return tokens, parents

    def best(self) -> list[list[Hypothesis]]:
        """Return the ``num_return_sequences`` best continuations of each prompt, the best first.

        Before the search is over, beams that still run count as if the limit were here. There are fewer
        continuations than asked for only if processors forbade all others.
        """
        count = self._settings.num_return_sequences
        return [
            _ranked((hypothesis for search in searches for hypothesis in search.best()), count)
            for searches in self._searches
        ]

    def _beams(self, prompt: int, group: int) -> slice:
        first = prompt * self._settings.num_beams + group * self._size
        return slice(first, first + self._size)

    def _less_likely(self, log_probs: Logits, taken: Sequence[Sequence[int]]) -> Logits:
        """Return ``log_probs`` less the penalty for every time that a token was taken for the same prompt."""
        out = log_probs.copy()
        penalty = np.float32(self._settings.diversity_penalty)
        for rows, tokens in zip(np.split(out, len(taken)), taken, strict=True):
            ids, times = np.unique(np.array(tokens, dtype=np.int64), return_counts=True)
            rows[:, ids] -= penalty * times.astype(np.float32)
        return out


class _Candidates(NamedTuple):
    """Continuations in the order of preference: their summed scores, the beams they continue, their tokens."""

    scores: Scores
    beams: Tokens
    tokens: Tokens


class _Search:
    """The beams of one prompt, or one group of them: what runs, and the best of what has ended.

    Groups follow transformers 4 in two details in which transformers 5 differs. They compare what has ended with
    the best candidate of a step, even if that one has ended too, instead of with the best running beam; and at
    the limit the running beams end, instead of the best candidates.
    """

    def __init__(
        self,
        settings: Settings,
        ends: NDArray[np.int64],
        start: int,
        limit: int,
        random: np.random.Generator,
    ) -> None:
        self._settings = settings
        self._grouped = settings.num_beam_groups > 1
        self._size = settings.num_beams // settings.num_beam_groups
        self._ends, self._start, self._limit, self._random = ends, start, limit, random
        self._ended: list[Hypothesis] = []
        self._length = 0
        # What runs. All beams begin alike, so only the first one may be continued.
        self._tokens = np.zeros((self._size, 0), dtype=np.int64)
        self._scores = np.full(self._size, _NEVER)
        self._scores[0] = 0
        self.done = False
        if limit <= 0:
            self._close()

    def step(self, history: History, scores: Logits) -> tuple[Tokens, Tokens]:
        """Return every beam's next token and the beam that it continues, both int64 [beams]."""
        candidates = self._candidates(scores)
        stops, spent = np.isin(candidates.tokens, self._ends), self._length + 1 >= self._limit
        past = history[:, self._start : self._start + self._length]
        self._length += 1
        # Candidates after as many as there are beams only replace beams that end.
        ending = (stops if self._grouped or not spent else np.ones_like(stops))[: self._size]
        sequences = np.column_stack([past[candidates.beams], candidates.tokens])
        self._end(sequences[: self._size][ending], candidates.scores[: self._size][ending])

        going = np.flatnonzero(~stops)
        going = going[np.argsort(-candidates.scores[going], kind="stable")][: self._size]
        # Where too few tokens are allowed, the first beam fills up; its copies are never continued.
        kept = np.zeros(self._size, dtype=np.int64)
        kept[: len(going)], kept[len(going) :] = going, going[0] if len(going) else 0
        self._scores = np.full(self._size, _NEVER)
        self._scores[: len(going)] = candidates.scores[going]
        self._tokens = sequences[kept]

        best = candidates.scores[0] if self._grouped else self._scores[0]
        self.done = not len(going) or not self._can_improve(best)
        if spent and not self.done:
            self._close()
        return candidates.tokens[kept], candidates.beams[kept]

    def best(self) -> list[Hypothesis]:
        """Return the best of what has ended and, unless the search is over, of what runs."""
        if self.done:
            return self._ended
        return _ranked([*self._ended, *self._hypotheses(self._tokens, self._scores)], self._size)

    def _candidates(self, scores: Logits) -> _Candidates:
        """Return so many continuations that as many as there are beams continue, whichever of them stop."""
        with np.errstate(invalid="ignore"):
            totals = (scores + self._scores[:, None]).reshape(-1)
        most = totals.max()
        if not np.isfinite(most):
            raise Error(
                "no token is left to continue any beam: processors or guidance forbid all of them."
                if most == _NEVER
                else "the scores of beam search hold NaN or infinity. Usual cause: fp16 activations that "
                "overflowed, or a damaged model file."
            )
        count = self._size * max(2, 1 + len(self._ends))
        if self._settings.samples:
            # What was drawn competes by its score, not by when it was drawn.
            places = _draw(totals, count, self._random)
            places = places[np.argsort(-totals[places], kind="stable")]
        else:
            places = _largest(totals, count)
        return _Candidates(totals[places], *np.divmod(places, scores.shape[1]))

    def _can_improve(self, best: np.float32) -> bool:
        """Whether to continue, given the sum of scores that is compared with what has ended."""
        wanted = self._settings
        if len(self._ended) < self._size:
            return True
        if wanted.early_stopping is True:
            return False
        # With a positive penalty a negative sum ranks highest at the greatest length.
        far = wanted.early_stopping == "never" and wanted.length_penalty > 0
        return float(self._normalized(best, self._limit if far else self._length)) > self._ended[-1].score

    def _close(self) -> None:
        """End the search with what runs, unless the last candidates have just ended it."""
        if self._grouped or not self._length:
            self._end(self._tokens, self._scores)
        self.done = True

    def _end(self, sequences: NDArray[np.int64], scores: Scores) -> None:
        self._ended = _ranked([*self._ended, *self._hypotheses(sequences, scores)], self._size)

    def _hypotheses(self, sequences: NDArray[np.int64], scores: Scores) -> list[Hypothesis]:
        return [
            Hypothesis(
                tokens=tuple(sequence.tolist()),
                score=float(self._normalized(score, self._length)),
                stopped=bool(np.isin(sequence[-1:], self._ends).any()),
            )
            for sequence, score in zip(sequences, scores, strict=True)
            if score > _NEVER
        ]

    def _normalized(self, score: np.float32, length: int) -> np.float32:
        """Return a sum of scores as it ranks: float32, because rounding decides between near equals."""
        # Clipped, so that extreme penalties make neither infinity nor NaN.
        with np.errstate(over="ignore", under="ignore"):
            power = np.float64(max(length, 1)) ** self._settings.length_penalty
        divisor = np.float32(np.clip(power, _RANGE.tiny, _RANGE.max))
        return np.float32(np.clip(np.float64(score) / divisor, _RANGE.min, _RANGE.max))


def _ranked(hypotheses: Iterable[Hypothesis], count: int) -> list[Hypothesis]:
    """Return the best ``count``, the best first, the earlier first among equals."""
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:count]


def _log_softmax(logits: Logits) -> Logits:
    """Return log-probabilities float32 [B, V]; rows without a number become NaN."""
    with np.errstate(invalid="ignore"):
        out: Logits = logits - logits.max(axis=1, keepdims=True)
        out -= np.log(np.exp(out).sum(axis=1, keepdims=True))
    return out


def _largest(values: NDArray[np.floating[Any]], count: int) -> Tokens:
    """Return where the ``count`` largest values lie, the largest first, the lower place among equals.

    Places of -inf are left out.
    """
    least = values.min() if count >= len(values) else np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= max(least, np.finfo(values.dtype).min))
    return places[np.argsort(-values[places], kind="stable")][:count]


def _draw(scores: Scores, count: int, random: np.random.Generator) -> Tokens:
    """Draw ``count`` different places with probabilities softmax(scores), the first drawn first.

    Gumbel noise turns drawing without replacement into a search for the largest: https://arxiv.org/abs/1903.06059.
    """
    possible = np.flatnonzero(scores > _NEVER)
    # Minus the logarithm of exponential noise is Gumbel noise, made faster.
    waits = np.maximum(random.standard_exponential(len(possible)), np.finfo(np.float64).tiny)
    return possible[_largest(scores[possible] - np.log(waits), count)]
