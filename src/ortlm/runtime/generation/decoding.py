"""What settings mean for the rows of a generation: which processors run, who draws, and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from ortlm.errors import BadOption
from ortlm.runtime.engine.types import Processor
from ortlm.runtime.generation.batch import TokenRows
from ortlm.runtime.generation.finish import answer_limit
from ortlm.runtime.generation.rules import Rules
from ortlm.runtime.sampling.logits_processors import from_settings, warpers
from ortlm.runtime.sampling.settings import Settings
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.runtime.structured_output.matcher import Guide, guided

# Up to so many of the most likely tokens are looked for without a pass over all that follows.
_FEW = 1024
# What is settled once a prompt has its rows.
_FIXED = ("num_beams", "num_return_sequences", "num_beam_groups")


@dataclass(frozen=True, slots=True)
class GuidedRow:
    """The guidance that a row follows from its token ``start`` on, and the matcher that holds it to that."""

    guidance: Guidance
    guide: Guide
    start: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen and when answers end. Never changed, but replaced as a whole.

    ``asked`` is what a caller asked for; ``settings`` are the same with the model's defaults, and bad words as
    token ids. ``stop_ids`` end an answer. Every row has random numbers (``randoms``), guidance (``guides``) and a
    number of tokens that its answer may have (``limits``). ``processors`` run at every step; ``warpers`` shape the
    probabilities where ``draws_among``. All of these are empty as long as there are no rows.
    """

    asked: Settings
    settings: Settings
    stop_ids: frozenset[int]
    randoms: Sequence[np.random.Generator] = ()
    guides: tuple[GuidedRow | None, ...] = ()
    limits: tuple[int, ...] = ()
    processors: tuple[Processor, ...] = ()
    warpers: tuple[Processor, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return not self.settings.samples and self.settings.num_beams == 1

    @property
    def wants_tokens_only(self) -> bool:
        """Whether nothing but the most likely token is asked of the logits."""
        return self.is_greedy and not self.processors and self.settings.logprobs is None

    @property
    def draws_among(self) -> bool:
        """Whether few enough tokens are drawn from; a draft model's need the probabilities of all."""
        settings = self.settings
        return (
            settings.samples
            and settings.num_beams == 1
            and 0 < (settings.top_k or 0) <= _FEW
            and (settings.draft is None or settings.draft == "lookup")
        )

    @property
    def each(self) -> int:
        """Rows to each prompt."""
        return max(self.settings.num_beams, self.settings.num_return_sequences)

    def fitted(self, rows: TokenRows, rules: Rules) -> Decoding:
        """Return the same for ``rows`` as they are now: where answers begin decides on processors and limits."""
        few = self.draws_among
        guides = [item.guide if item else None for item in self.guides]
        starts = [item.start if item else 0 for item in self.guides]
        return replace(
            self,
            limits=tuple(answer_limits(self.settings, rows, rules)),
            processors=tuple(
                from_settings(
                    self.settings,
                    starts=rows.starts.tolist(),
                    stop_ids=self.stop_ids,
                    # What looks at few tokens only bars them itself.
                    forbidden=None if self.is_greedy or few else rules.forbidden,
                    warp=not few,
                    guide=guided(guides, starts) if any(guides) else None,
                )
            ),
            # They see few tokens, so that the rank is taken before.
            warpers=tuple(warpers(replace(self.settings, top_k=0))) if few else (),
        )


def resolved(asked: Settings, rules: Rules, *, fixed: Settings | None) -> Settings:
    """Return ``asked`` with the model's defaults, and bad words as token ids.

    Raises BadOption where they differ from ``fixed`` in what is settled with the first prompt, and for bad words
    that cannot become tokens.
    """
    filled = asked.with_defaults(rules.published)
    if fixed is not None:
        for name in _FIXED:
            if getattr(fixed, name) != getattr(filled, name):
                raise BadOption(f"{name} is fixed once the first prompt is there; begin a new generator.")
    words = _word_ids(filled.bad_words or (), rules)
    return filled if words == filled.bad_words else replace(filled, bad_words=words)


def stop_ids_of(settings: Settings, rules: Rules) -> frozenset[int]:
    """Return the tokens that end an answer: those of ``settings``, and of ``rules`` unless they are ignored."""
    own = frozenset[int]() if settings.ignore_eos else rules.stop_token_ids
    return own | frozenset(settings.stop_token_ids)


def answer_limits(settings: Settings, rows: TokenRows, rules: Rules) -> list[int]:
    """Return how many tokens the answer of each of ``rows`` may have."""
    return [
        answer_limit(settings, prompt_tokens=start, context_tokens=rules.context_tokens)
        for start in rows.starts.tolist()
    ]


class RowRandoms(Sequence["np.random.Generator"]):
    """Random numbers for each of ``seeds``, made when the first is drawn: greedy answers never do."""

    def __init__(self, seeds: Sequence[int | None]) -> None:
        self._seeds = seeds
        self._made: list[np.random.Generator] = []

    def __len__(self) -> int:
        return len(self._seeds)

    @overload
    def __getitem__(self, row: int) -> np.random.Generator: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[np.random.Generator]: ...

    def __getitem__(self, row: int | slice) -> np.random.Generator | Sequence[np.random.Generator]:
        if not self._made:
            self._made = [np.random.default_rng(seed) for seed in self._seeds]
        return self._made[row]


def row_randoms(settings: Settings, prompts: int, each: int) -> Sequence[np.random.Generator]:
    """Return random numbers for ``each`` row of every one of ``prompts``.

    Every row has its own, so that it does not depend on the rest of the batch. Raises BadOption for another number
    of seeds than there are rows.
    """
    one_by_one = isinstance(settings.seed, tuple)
    seeds = settings.seeds(prompts * each) if one_by_one else settings.seeds(each) * prompts
    return RowRandoms(seeds)


def guided_row(
    guidance: Guidance | None,
    rows: TokenRows,
    row: int,
    *,
    rules: Rules,
    stop_ids: frozenset[int],
    start: int | None = None,
) -> GuidedRow | None:
    """Return ``guidance`` for ``row`` of ``rows`` from its token ``start`` on, by default from its next one.

    None if there is none. Raises BadOption if the model has no tokenizer to guide by.
    """
    if guidance is None:
        return None
    if rules.guide is None:
        raise BadOption("guidance needs a tokenizer, and this model has none.")
    start = int(rows.lengths[row]) if start is None else start
    prompt = rows.tokens(row)[:start].tolist()
    return GuidedRow(guidance, rules.guide(guidance, stop_ids, prompt), start)


def guided_rows(
    settings: Settings, rows: TokenRows, prompts: int, each: int, *, rules: Rules, stop_ids: frozenset[int]
) -> tuple[GuidedRow | None, ...]:
    """Return the guidance of ``settings`` for all ``rows``, ``each`` of every one of ``prompts``.

    It holds from the next token on. Raises BadOption if there are entries for another number of prompts.
    """
    wanted = settings.guidance
    listed = list(wanted) if isinstance(wanted, Sequence) else [wanted] * len(rows)
    if len(listed) == prompts:
        listed = [item for item in listed for _ in range(each)]
    if len(listed) != len(rows):
        raise BadOption(
            f"guidance has {len(listed)} entries for {prompts} prompts; give one each, or one for all."
        )
    return tuple(
        guided_row(item, rows, row, rules=rules, stop_ids=stop_ids) for row, item in enumerate(listed)
    )


def _word_ids(words: Sequence[str | Sequence[int]], rules: Rules) -> tuple[tuple[int, ...], ...]:
    ids: list[tuple[int, ...]] = []
    for word in words:
        if not isinstance(word, str):
            ids.append(tuple(word))
        elif rules.words is None:
            raise BadOption("bad_words as texts need a tokenizer, and this model has none; give token ids.")
        else:
            ids += rules.words(word)
    return tuple(ids)
