"""Drafts of what may come next, which the model checks several at a time.

A run on eight tokens costs little more than one on a single token, because both read all weights once. So
whoever guesses the next tokens cheaply lets one run confirm several of them. Nothing here decides what is
generated: a wrong guess only costs time.
Source: https://arxiv.org/abs/2211.17192; prompt-lookup decoding: https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.token_ids import common_prefix_length, text_tokens_only
from ortlm.runtime.engine.types import Logits
from ortlm.runtime.sampling.logits_processors import from_settings
from ortlm.runtime.sampling.sampler import multinomial, probabilities
from ortlm.runtime.sampling.settings import Settings

_LONGEST_MATCH = 32
_LONGEST_WAIT = 32


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens; ``probabilities`` float64 [V] are those that each was drawn from, empty if none was."""

    tokens: Sequence[int]
    probabilities: list[NDArray[np.float64]] = field(default_factory=list)


class Proposer(Protocol):
    """Guesses what comes next."""

    def propose(
        self, row: int, tokens: NDArray[np.int64], room: int, random: np.random.Generator
    ) -> Draft | None:
        """Return at most ``room`` tokens that may follow ``tokens``, all of row ``row`` so far; None for none."""

    def adapt(self, settings: Settings) -> None:
        """Take note of changed settings."""


class _Pace:
    """How many tokens are worth guessing, by how the last guesses went.

    What is confirmed entirely is doubled; after a failure it is as much as was right. Guesses that are all
    wrong are followed by longer and longer pauses, so that hopeless text costs nearly nothing.
    """

    def __init__(self, first: int) -> None:
        self._size = first
        self._misses = 0
        self._wait = 0
        self._guessed: Sequence[int] = ()
        self._at = 0

    def room(self, tokens: NDArray[np.int64]) -> int:
        """Judge the last guess by ``tokens`` and return how many to guess now."""
        guessed, self._guessed = self._guessed, ()
        if guessed:
            came = tokens[self._at : self._at + len(guessed)].tolist()
            right = common_prefix_length(guessed, came)
            if right == len(guessed):
                self._size, self._misses = 2 * self._size, 0
            elif right:
                self._size, self._misses = right, 0
            else:
                self._size, self._misses = 1, self._misses + 1
                self._wait = min(2**self._misses, _LONGEST_WAIT)
        self._wait = max(0, self._wait - 1)
        return 0 if self._wait else self._size

    def remember(self, at: int, tokens: Sequence[int]) -> None:
        """Take note that ``tokens`` are guessed for position ``at`` and on."""
        self._at, self._guessed = at, tokens


class Lookup:
    """Guesses that what followed the same last words before will follow them again.

    ``least_match`` tokens at least must be the same. ``chained``: what was guessed is looked up in turn, until
    there are as many tokens as are worth a guess, of which ``least_tokens`` always are.
    """

    def __init__(self, *, least_match: int = 2, chained: bool = False, least_tokens: int = 0) -> None:
        self._least, self._chained, self._least_tokens = least_match, chained, least_tokens
        self._paces: dict[int, _Pace] = {}

    def adapt(self, settings: Settings) -> None:
        """Nothing depends on settings."""

    def propose(
        self, row: int, tokens: NDArray[np.int64], room: int, random: np.random.Generator
    ) -> Draft | None:
        """Return what followed the longest earlier occurrence of the last tokens, the latest among equals."""
        pace = self._paces.setdefault(row, _Pace(4))
        size = min(room, max(pace.room(tokens), self._least_tokens))
        drafted: list[int] = []
        while len(drafted) < size:
            text = np.concatenate([tokens, np.array(drafted, tokens.dtype)]) if drafted else tokens
            more = self._following(text, size - len(drafted))
            drafted += more
            if not more or not self._chained:
                break
        if not drafted:
            return None
        pace.remember(len(tokens), drafted)
        return Draft(drafted)

    def _following(self, tokens: NDArray[np.int64], size: int) -> list[int]:
        places = np.flatnonzero(tokens[:-1] == tokens[-1])
        matched = 1
        while len(places) and matched < min(_LONGEST_MATCH, len(tokens) - 1):
            longer = places[places >= matched]
            longer = longer[tokens[longer - matched] == tokens[-1 - matched]]
            if not len(longer):
                break
            places, matched = longer, matched + 1
        if not len(places) or matched < self._least:
            return []
        # The latest place may be so near that little follows it; an earlier one then says more.
        enough = places[places < len(tokens) - size]
        at = int((enough if len(enough) else places)[-1]) + 1
        return text_tokens_only(tokens[at : at + size].tolist())


class DraftModel:
    """Guesses what a smaller model would say; drawn from its probabilities if the settings sample.

    ``loop`` is the small model's. ``vocab_size`` is the width of the large model's logits.
    """

    def __init__(self, loop: Loop, settings: Settings, *, vocab_size: int) -> None:
        self.loop = loop
        self._vocab = vocab_size
        self._paces: dict[int, _Pace] = {}
        self._row = -1
        self.adapt(settings)

    def adapt(self, settings: Settings) -> None:
        """Draw as ``settings`` say; what only the large model can know is left out."""
        self._samples = settings.samples
        plain = replace(
            settings,
            bad_words=(),
            guidance=None,
            processors=(),
            min_length=0,
            min_new_tokens=0,
            begin_suppress_tokens=(),
        )
        self._processors = from_settings(plain, starts=[0])

    def propose(
        self, row: int, tokens: NDArray[np.int64], room: int, random: np.random.Generator
    ) -> Draft | None:
        """Return what the small model generates after ``tokens``."""
        pace = self._paces.setdefault(row, _Pace(3))
        size = min(room, pace.room(tokens), self.loop.context_tokens - len(tokens))
        if size < 1:
            return None
        history = tokens.tolist()
        logits = self._logits(history)
        drafted: list[int] = []
        drawn: list[NDArray[np.float64]] = []
        while True:
            processed = logits
            for process in self._processors:
                processed = process(np.array([history], dtype=np.int64), processed)
            if self._samples:
                token = int(multinomial(processed, [random])[0])
                drawn.append(probabilities(processed[0]))
            else:
                token = int(np.argmax(processed[0]))
            drafted.append(token)
            history.append(token)
            if len(drafted) == size:
                break
            logits = self._fit(self.loop.append([[token]]))
        pace.remember(len(tokens), drafted)
        return Draft(drafted, drawn)

    def _logits(self, history: list[int]) -> Logits:
        """Return the small model's logits after ``history``; only what is new to it is fed."""
        loop = self.loop
        if len(loop.history) != 1:
            loop.start()
        same = common_prefix_length(loop.history[0], history)
        loop.trim(min(same, len(history) - 1))
        return self._fit(loop.append([history[loop.length :]]))

    def _fit(self, logits: Logits) -> Logits:
        """Return ``logits`` as wide as the large model's: families pad their vocabularies differently."""
        missing = self._vocab - logits.shape[1]
        if missing > 0:
            return np.pad(logits, ((0, 0), (0, missing)), constant_values=-np.inf)
        return logits[:, : self._vocab]
