"""The generation loop, token by token, with everything between two tokens open to change.

generator = lm.generator(temperature=0.7, max_new_tokens=64)
generator.append(lm.encode("The capital of France is"))
while not generator.done:
    token = generator.step()[0]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import BadOption, CannotRewind, ContextFull
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.prompt_cache import restore, save
from ortlm.runtime.engine.session import DeviceTensor
from ortlm.runtime.engine.token_ids import FIRST_PICTURE, common_prefix_length
from ortlm.runtime.engine.types import Logits
from ortlm.runtime.generation.batch import TokenRows, as_lengths, as_rows
from ortlm.runtime.generation.speculative import Draft, Proposer
from ortlm.runtime.sampling.beam_search import Beams
from ortlm.runtime.sampling.logits_processors import from_settings, warpers
from ortlm.runtime.sampling.logprobs import TokenLogprob, token_logprob
from ortlm.runtime.sampling.sampler import Tokens, accept, draw_among, greedy, multinomial
from ortlm.runtime.sampling.settings import Options, Settings
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.runtime.structured_output.matcher import Guide, guided

if TYPE_CHECKING:
    from typing import Unpack

# Up to so many of the likeliest tokens are looked for without a pass over all that follows.
_FEW = 1024
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a model prescribes to every generation.

    ``published`` are the publisher's sampling defaults, ``forbidden`` bool [V] the ids
    without a token, None if there are none. ``guide``
    makes a matcher of a Guidance, the stop tokens and the prompt; ``words`` turns a text into the token
    sequences that write it; ``proposer`` makes what drafts tokens for some settings; ``adapter`` returns the
    tensors of an adapter by input, those of none for None; ``fingerprint`` tells the model with an adapter
    from any other. ``pictures``: prompts may hold tokens of pictures.
    """

    context_tokens: int
    vocab_size: int
    stop_token_ids: frozenset[int] = frozenset()
    published: Mapping[str, Any] = field(default_factory=dict)
    forbidden: NDArray[np.bool_] | None = None
    guide: Callable[[Guidance, Collection[int], Sequence[int]], Guide] | None = None
    words: Callable[[str], list[tuple[int, ...]]] | None = None
    proposer: Callable[[Settings], Proposer | None] | None = None
    adapter: Callable[[str | None], Mapping[str, DeviceTensor]] | None = None
    fingerprint: Callable[[str | None], str] | None = None
    pictures: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated for a prompt: the new tokens, a stop token included, and why it ended.

    ``finish_reason`` is None if it has not. ``score`` is what beam search ranks by, None without beams.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    score: float | None = None


@dataclass(slots=True)
class _Ahead:
    """Drafted tokens that the model has seen already, and the logits after each."""

    tokens: list[int]
    probabilities: list[NDArray[np.float64]]
    logits: Logits

    def rest(self) -> _Ahead | None:
        """Return what is left when the first token has been confirmed."""
        if len(self.tokens) == 1:
            return None
        return _Ahead(self.tokens[1:], self.probabilities[1:], self.logits[1:])


@dataclass(frozen=True, slots=True)
class _Guided:
    """What a row has to look like from its token ``start`` on."""

    guidance: Guidance
    guide: Guide
    start: int


class Generator:
    """Generates for one prompt or a batch of them, one token per row and step.

    With several answers to a prompt (``num_return_sequences`` or ``num_beams``), those to prompt p are the
    rows p·n to p·n + n - 1; ``prompts`` counts prompts. ``cached_tokens`` were in the cache at the beginning,
    ``runs`` counts calls of the model, ``proposed_tokens`` and ``accepted_tokens`` drafts. ``logprobs`` has an
    entry for each row of the last step, None where none was asked for. For one thread at a time, but for
    ``cancel``.

    Beneath it lie the decode ``loop`` and the ``proposer`` of drafts, if there is one. ``mixed``: whether the
    cache holds what different adapters computed.
    """

    def __init__(self, loop: Loop, rules: Rules, settings: Settings) -> None:
        self.loop = loop
        self._rules = rules
        self._rows = TokenRows(0)
        # How many of its tokens the model has seen, row by row.
        self._fed = np.zeros(0, dtype=np.int64)
        self._reasons: list[FinishReason | None] = []
        self._guides: list[_Guided | None] = []
        self._ahead: list[_Ahead | None] = []
        self._logits: Logits | None = None
        self._beams: Beams | None = None
        self.proposer: Proposer | None = None
        self._randoms: list[np.random.Generator] = []
        self._stop_ids: frozenset[int] = frozenset()
        self.prompts = 0
        self.cached_tokens = 0
        self.proposed_tokens = 0
        self.accepted_tokens = 0
        self.runs = 0
        self.mixed = False
        self.logprobs: list[TokenLogprob | None] = []
        # Ids without a token are nearly always the last ones, so that nothing need be looked up for the others.
        self._bound: int | None = None
        self._gaps = rules.forbidden
        if rules.forbidden is not None:
            self._bound = int(np.flatnonzero(~rules.forbidden)[-1]) + 1
            gaps = rules.forbidden[: self._bound]
            self._gaps = gaps if gaps.any() else None
        self._take(settings, None)

    # --- what there is ----------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many answers are generated at once; 0 before the first append."""
        return len(self._rows)

    @property
    def done(self) -> bool:
        """Whether no row wants another token; False before the first append."""
        return self.rows > 0 and None not in self._reasons

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each row ended: "stop" (stop token or text), "length" or "cancelled"; None if it has not."""
        return list(self._reasons)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._stop_ids

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, the prompt included."""
        return [int(length) for length in self._rows.lengths]

    def sequence(self, row: int = 0) -> list[int]:
        """Return all tokens of ``row``, the prompt included; with beams, of that answer.

        Raises BadOption if there is no such row or answer.
        """
        if self._beams is not None:
            listed = [
                [*self._rows.prompt(prompt * self._each), *answer.token_ids]
                for prompt, answers in enumerate(self.answers())
                for answer in answers
            ]
            if 0 <= row < len(listed):
                return listed[row]
            raise BadOption(f"there is no answer {row}; there are {len(listed)}.")
        self._check_row(row)
        found: list[int] = self._rows.tokens(row).tolist()
        return found

    def answers(self) -> list[list[Answer]]:
        """Return what was generated since the last append: the answers to each prompt, best first."""
        if self._beams is not None:
            return [
                [
                    Answer(
                        best.tokens, "stop" if best.stopped else self._reasons[row * self._each], best.score
                    )
                    for best in found
                ]
                for row, found in enumerate(self._beams.best())
            ]
        made = [Answer(tuple(self._rows.answer(row)), reason) for row, reason in enumerate(self._reasons)]
        return [made[at : at + self._each] for at in range(0, self.rows, self._each)]

    @property
    def settings(self) -> Settings:
        """What is asked for. Assign others, or call ``change``, between any two steps."""
        return self._asked

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._take(settings, self._settings)

    def change(self, **options: Unpack[Options]) -> None:
        """Change single settings, given as ``options`` by their names in Settings, from the next token on.

        Raises BadOption for values that cannot be used, and for what is fixed with the first prompt; nothing
        changes then.
        """
        self._take(Settings.of(self._asked, options), self._settings)

    def guide(self, guidance: Guidance | None, row: int = 0) -> None:
        """Let ``row`` follow ``guidance`` from its next token on; None lets it go free."""
        self._check_row(row)
        self._guides[row] = self._guide(guidance, row)
        self._renew()

    # --- the loop ---------------------------------------------------------------------------------------

    def append(self, tokens: Sequence[int] | Sequence[Sequence[int]] | NDArray[Any]) -> None:
        """Take the ``tokens`` of the prompt, or of one for each row, and feed them to the model at once.

        After generated tokens this continues the conversation; every row gets its own tokens, an empty list
        for none. Lengths are those of the lists: no token id stands for padding.
        Raises ContextFull if it does not fit, BadOption for ids outside the vocabulary; nothing changes then.
        """
        given = as_rows(tokens)
        if self._beams is not None:
            raise BadOption("beams end with their answers and cannot be continued; begin a new generator.")
        if self.rows and len(given) != self.rows:
            raise BadOption(f"there are {self.rows} rows, but tokens for {len(given)} were given.")
        self._check_tokens(given)
        first = not self.rows
        if first:
            self._begin(given)
        for row, more in enumerate(given):
            if more:
                self._rows.prompt_with(row, more)
                self._reasons[row] = None
        self._drop_logits()
        self._end_spent()
        try:
            if not self.done:
                self._feed()
            if first:
                self._spread()
        except BaseException:
            if first:
                # The rows are not spread out yet; the prompt may be appended again, and what is computed stays.
                self._arrange(0)
            else:
                self._guide_anew(given)
            raise
        if first:
            self._renew()
        else:
            self._guide_anew(given)

    def _guide_anew(self, given: list[list[int]]) -> None:
        """Let the answers behind new tokens begin their form from the start."""
        for row, more in enumerate(given):
            item = self._guides[row]
            if more and item is not None:
                self._guides[row] = self._guide(item.guidance, row)
        self._renew()

    def step(self) -> Tokens:
        """Choose the next token of every row and return them, int64 [rows]; -1 for rows that have ended.

        The model runs if the logits are not there yet. With ``logprobs`` asked for, ``generator.logprobs`` are
        those of this step. Raises BadOption if there is nothing to continue.
        """
        if self.done:
            raise BadOption("every row has ended; append tokens, rewind or change the settings to go on.")
        logits = self._current()
        if self._beams is not None:
            return self._step_beams(self._beams, logits)
        processed = logits
        for process in self._processors:
            processed = process(self._rows.history, processed)
        if any(self._reasons):
            # Rows that have ended are not chosen for; what is forbidden there is nobody's trouble.
            processed = processed.copy()
            ended = [row for row, reason in enumerate(self._reasons) if reason is not None]
            processed[ended] = logits[ended]
        tokens = self._choose(processed)
        top = self._settings.logprobs
        self.logprobs = [
            None if top is None or reason is not None else token_logprob(logits[row], int(tokens[row]), top)
            for row, reason in enumerate(self._reasons)
        ]
        for row, reason in enumerate(self._reasons):
            if reason is not None:
                tokens[row] = -1
                continue
            token = int(tokens[row])
            self._rows.put(row, token)
            self._end_if_due(row, token)
        self._advance(tokens)
        return tokens

    @property
    def logits(self) -> Logits:
        """The model's logits for the next token, float32 [rows, V], before any processor: a copy, to be read.

        They are computed if they are not there yet. Assign others, and ``step`` chooses by those.
        """
        logits = self._current().copy()
        logits.flags.writeable = False
        return logits

    @logits.setter
    def logits(self, logits: Logits) -> None:
        shape, found = self._current().shape, np.array(logits, dtype=np.float32)
        if found.shape != shape:
            raise BadOption(f"logits must have shape {list(shape)}, found {list(found.shape)}.")
        self._logits = found

    def _current(self) -> Logits:
        if not self.rows:
            raise BadOption("there is a row without a prompt; append its tokens first.")
        if self._logits is None:
            self._feed()
        assert self._logits is not None
        return self._logits

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Rewind to ``lengths`` tokens, all rows alike or row by row; what follows is generated again.

        Raises CannotRewind for more tokens than there are, and for beams.
        """
        if self._beams is not None:
            raise CannotRewind("beams have no single past to go back to; begin a new generator.")
        each = as_lengths(lengths, self._rows)
        if each == self.lengths:
            return
        for row, length in enumerate(each):
            if self._rows.cut(row, length):
                self._fed[row] = min(int(self._fed[row]), length)
                self._reasons[row] = None
                guide = self._guides[row]
                if guide is not None:
                    self._guides[row] = self._guide(guide.guidance, row, min(guide.start, length))
        self._drop_logits()
        self._renew()

    def finish(self, row: int, reason: FinishReason) -> None:
        """End ``row`` for a ``reason`` seen from outside, such as a stop text.

        Raises BadOption if there is no such row.
        """
        self._check_row(row)
        self._reasons[row] = reason

    def cancel(self) -> None:
        """End what another thread is doing with this generator, or else its next run, with Cancelled.

        The generator stays usable and goes on from what was computed.
        """
        self.loop.cancel()

    def save(self, path: str | Path) -> None:
        """Write the tokens so far to the file ``path``, with the cache of all that the model has seen.

        Raises BadOption for beams, for a row without a prompt, and after a change of the adapter.
        """
        if not self.rows or not self._rows.lengths.all() or self._beams is not None:
            raise BadOption("there is nothing to save: a row without a prompt, or beams.")
        if self.mixed:
            raise BadOption("the adapter was changed on the way; what two models computed cannot be saved.")
        self._drop_logits()
        self._feed(everything=True)
        save(self.loop, Path(path), model=self._fingerprint())

    def restore(self, path: str | Path) -> None:
        """Begin with the tokens and the cache that ``save`` wrote to the file ``path``.

        Raises BadArtifact if another model wrote them or the file is damaged, BadOption if there are tokens
        already.
        """
        if self.rows:
            raise BadOption("restore begins a generator, and this one has tokens already.")
        restore(self.loop, Path(path), model=self._fingerprint())
        self._arrange(len(self.loop.history))
        for row, tokens in enumerate(self.loop.history):
            self._rows.prompt_with(row, tokens)
        self._fed = self._rows.lengths.copy()
        self.cached_tokens = int(self._fed.sum())
        if self._each > 1:
            self._feed()
        self._spread()
        self._renew()

    # --- rows -------------------------------------------------------------------------------------------

    @property
    def _each(self) -> int:
        """Rows to each prompt."""
        return max(self._settings.num_beams, self._settings.num_return_sequences)

    def _fingerprint(self) -> str:
        make = self._rules.fingerprint
        return make(self._settings.adapter) if make is not None else ""

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.rows:
            raise BadOption(f"there is no row {row}; there are {self.rows}.")

    def _check_tokens(self, given: list[list[int]]) -> None:
        context, vocab = self._rules.context_tokens, self._rules.vocab_size
        if not any(given):
            raise BadOption("there is nothing to append: no row has a new token.")
        for row, more in enumerate(given):
            past = self.lengths[row] if self.rows else 0
            if not more and past:
                continue
            if not more and not past:
                raise BadOption(f"row {row} is empty: there must be at least one token to continue.")
            if past + len(more) > context:
                what = f"the prompt has {len(more)}" if not past else f"{past} and {len(more)} more are"
                raise ContextFull(f"{what} tokens, but the model's context holds {context}.")
            for at, token in enumerate(more):
                if not 0 <= token < (vocab or token + 1) and not (
                    self._rules.pictures and token >= FIRST_PICTURE
                ):
                    raise BadOption(
                        f"token id {token} at index {at} is outside the vocabulary 0 … {vocab - 1}."
                    )

    def _arrange(self, count: int) -> None:
        self.prompts = count
        self._rows = TokenRows(count)
        self._fed = np.zeros(count, dtype=np.int64)
        self._reasons = [None] * count
        self._guides = [None] * count
        self._ahead = [None] * count

    def _begin(self, prompts: list[list[int]]) -> None:
        """Make a row of each prompt; what the loop holds of a single one already is not fed again."""
        self._arrange(len(prompts))
        if len(prompts) == len(self.loop.history) == 1:
            # The logits after the last token are needed, so that one is always fed.
            self._fed[0] = min(common_prefix_length(self.loop.history[0], prompts[0]), len(prompts[0]) - 1)
            self.cached_tokens = int(self._fed[0])
        else:
            self.loop.start(len(prompts))

    def _spread(self) -> None:
        """Make as many rows of each prompt as there will be answers."""
        settings = self._settings
        if settings.num_beams > 1:
            seeds = [settings.seed] * self.prompts
            if isinstance(settings.seed, tuple):
                seeds = list(settings.seeds(self.prompts))
            self._beams = Beams(
                prompts=self.prompts,
                settings=settings,
                stop_ids=self._stop_ids,
                starts=self.lengths,
                limits=[self._limit(row) for row in range(self.rows)],
                processors=(),
                randoms=[np.random.default_rng(seed) for seed in seeds],
            )
        else:
            self._seed(self.prompts * self._each)
        self._select(np.repeat(np.arange(self.prompts), self._each))
        self._guide_all()

    def _select(self, rows: NDArray[np.int64]) -> None:
        if np.array_equal(rows, np.arange(self.rows)):
            return
        self.loop.trim(self._fed.tolist())
        self.loop.select(rows)
        self._rows.select(rows)
        self._fed = self._fed[rows]
        self._reasons = [self._reasons[row] for row in rows]
        self._guides = [self._guides[row] for row in rows]
        self._ahead = [None] * len(rows)
        if self._logits is not None:
            self._logits = self._logits[rows]

    # --- settings ---------------------------------------------------------------------------------------

    def _take(self, settings: Settings, before: Settings | None) -> None:
        """Adopt settings in place of those ``before``; if they cannot be used, nothing changes."""
        if self._beams is not None:
            raise BadOption("beams keep the settings that they began with; begin a new generator.")
        kept = dict(self.__dict__)
        try:
            self._adopt(settings, before)
        except BaseException:
            self.__dict__.update(kept)
            raise

    def _adopt(self, settings: Settings, before: Settings | None) -> None:
        filled = settings.with_defaults(self._rules.published)
        if before is not None and self.rows:
            for name in ("num_beams", "num_return_sequences", "num_beam_groups"):
                if getattr(before, name) != getattr(filled, name):
                    raise BadOption(f"{name} is fixed once the first prompt is there; begin a new generator.")
        filled = replace(filled, bad_words=self._word_ids(filled.bad_words or ()))
        if before is None or filled.draft is not before.draft:
            make = self._rules.proposer
            self.proposer = make(filled) if make is not None else None
        elif self.proposer is not None:
            self.proposer.adapt(filled)
        if filled.adapter != (before.adapter if before else None):
            if self._rules.adapter is None:
                raise BadOption(f"adapter {filled.adapter!r} is asked for, but this model takes none.")
            self.loop.use(self._rules.adapter(filled.adapter))
        self._asked, self._settings = settings, filled
        own = frozenset[int]() if filled.ignore_eos else self._rules.stop_token_ids
        stop_ids, self._stop_ids = self._stop_ids, own | frozenset(filled.stop_token_ids)
        if before is None or not self.rows:
            return
        if filled.seed != before.seed:
            self._seed(self.rows)
        if filled.guidance is not before.guidance:
            self._guide_all()
        elif stop_ids != self._stop_ids:
            self._guides = [
                self._guide(old.guidance, row, old.start) if old else None
                for row, old in enumerate(self._guides)
            ]
        for row, reason in enumerate(self._reasons):
            if reason == "length" and self._new_tokens(row) < self._limit(row):
                self._reasons[row] = None
                self._drop_logits()
        if filled.adapter != before.adapter:
            self.mixed = True
            self._drop_logits()
        self._renew()

    def _seed(self, rows: int) -> None:
        """Give every row random numbers of its own, so that it does not depend on the rest of the batch."""
        seeds = self._settings.seeds(rows)
        if not isinstance(self._settings.seed, tuple):
            seeds = self._settings.seeds(self._each) * self.prompts
        self._randoms = [np.random.default_rng(seed) for seed in seeds]

    def _guide_all(self) -> None:
        """Let every row follow the guidance of the settings from here on."""
        wanted = self._settings.guidance
        listed = list(wanted) if isinstance(wanted, Sequence) else [wanted] * self.rows
        if len(listed) == self.prompts:
            listed = [item for item in listed for _ in range(self._each)]
        if len(listed) != self.rows:
            raise BadOption(
                f"guidance has {len(listed)} entries for {self.prompts} prompts; give one each, or one for all."
            )
        self._guides = [self._guide(item, row) for row, item in enumerate(listed)]

    def _guide(self, guidance: Guidance | None, row: int, start: int | None = None) -> _Guided | None:
        if guidance is None:
            return None
        if self._rules.guide is None:
            raise BadOption("guidance needs a tokenizer, and this model has none.")
        start = int(self._rows.lengths[row]) if start is None else start
        prompt = self._rows.tokens(row)[:start].tolist()
        return _Guided(guidance, self._rules.guide(guidance, self._stop_ids, prompt), start)

    def _word_ids(self, words: Sequence[str | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        found: list[tuple[int, ...]] = []
        for word in words:
            if not isinstance(word, str):
                found.append(tuple(word))
            elif self._rules.words is None:
                raise BadOption(
                    "bad_words as texts need a tokenizer, and this model has none; give token ids."
                )
            else:
                found += self._rules.words(word)
        return tuple(found)

    def _renew(self) -> None:
        """Make the processors anew, which know where answers begin."""
        guides = [item.guide if item else None for item in self._guides]
        starts = [item.start if item else 0 for item in self._guides]
        self._processors = from_settings(
            self._settings,
            starts=self._rows.starts.tolist(),
            stop_ids=self._stop_ids,
            # What looks at few tokens only bars them itself.
            forbidden=None if self._is_greedy or self._draws_among else self._rules.forbidden,
            warp=not self._draws_among,
            guide=guided(guides, starts) if any(guides) else None,
        )
        self._limits = [self._limit(row) for row in range(self.rows)]
        # They see few tokens, so that the rank is taken before.
        self._warpers = warpers(replace(self._settings, top_k=0))
        if self._beams is not None:
            self._beams.processors = self._processors
        self._end_spent()

    # --- the end of rows --------------------------------------------------------------------------------

    def _new_tokens(self, row: int) -> int:
        return int(self._rows.lengths[row] - self._rows.starts[row])

    def _limit(self, row: int) -> int:
        """Return how many tokens the answer of ``row`` may have."""
        start, settings = int(self._rows.starts[row]), self._settings
        # The last token that fits is generated, but never fed.
        limit = self._rules.context_tokens - start + 1
        if settings.max_length is not None:
            limit = min(limit, settings.max_length - start)
        if settings.max_new_tokens is not None:
            limit = min(limit, settings.max_new_tokens)
        return max(0, limit)

    def _end_spent(self) -> None:
        """End rows that may not have a single token more."""
        for row, reason in enumerate(self._reasons):
            if reason is None and self._rows.lengths[row] and self._new_tokens(row) >= self._limit(row):
                self._reasons[row] = "length"

    def _end_if_due(self, row: int, token: int) -> None:
        if token in self._stop_ids:
            self._reasons[row] = "stop"
        elif self._new_tokens(row) >= self._limits[row]:
            self._reasons[row] = "length"
        elif not self._stop_ids and self._is_complete(row):
            self._reasons[row] = "stop"

    def _is_complete(self, row: int) -> bool:
        """Return whether the row's guidance wants nothing more, which ends it if there is no stop token."""
        item = self._guides[row]
        return item is not None and item.guide.finished(self._rows.tokens(row, item.start))

    # --- one step ---------------------------------------------------------------------------------------

    @property
    def _is_greedy(self) -> bool:
        return not self._settings.samples and self._settings.num_beams == 1

    @property
    def _draws_among(self) -> bool:
        """Whether few enough tokens are drawn from; a draft model's need the probabilities of all."""
        settings = self._settings
        return (
            settings.samples
            and settings.num_beams == 1
            and 0 < (settings.top_k or 0) <= _FEW
            and (settings.draft is None or settings.draft == "lookup")
        )

    def _choose(self, logits: Logits) -> Tokens:
        if self._is_greedy:
            return greedy(logits[:, : self._bound], forbidden=self._gaps)
        if self._draws_among:
            return draw_among(
                logits[:, : self._bound],
                self._randoms,
                count=self._settings.top_k or 0,
                warpers=self._warpers,
                forbidden=self._gaps,
            )
        # A draft that was not drawn needs no rejection: drawing and comparing is the same.
        tokens = multinomial(logits, self._randoms)
        for row, ahead in enumerate(self._ahead):
            if ahead is not None and ahead.probabilities:
                tokens[row], _ = accept(
                    ahead.tokens[0], ahead.probabilities[0], logits[row], self._randoms[row]
                )
        return tokens

    def _advance(self, tokens: Tokens) -> None:
        """Take the next logits from those computed ahead, if the draft of every row was right."""
        following: Logits | None = None
        complete = True
        for row, ahead in enumerate(self._ahead):
            if ahead is not None and ahead.tokens[0] == tokens[row]:
                self._fed[row] += 1
                self.accepted_tokens += 1
                if following is None and self._logits is not None:
                    following = self._logits.copy()
                if following is not None:
                    following[row] = ahead.logits[0]
                self._ahead[row] = ahead.rest()
            elif self._reasons[row] is None:
                complete = False
        if following is None or not complete:
            self._drop_logits()
        else:
            self._logits = following

    def _drop_logits(self) -> None:
        self._logits, self._ahead = None, [None] * self.rows

    def _feed(self, *, everything: bool = False) -> None:
        """Feed what the model has not seen of each row, and drafts behind it.

        A row that has ended waits: its last token is fed if the conversation goes on. ``everything`` feeds that
        too, and no drafts.
        """
        loop, rows = self.loop, self._rows
        if (
            self.proposer is None
            and self.rows == 1
            and rows.lengths[0] == len(loop.history[0]) + 1 == self._fed[0] + 1
        ):
            # What nearly every step is.
            self.runs += 1
            self._logits = loop.step(rows.tokens(0)[-1:])
            self._fed[0] += 1
            return
        if not rows.lengths.all():
            raise BadOption("there is a row without a prompt; append its tokens first.")
        self._fed = np.minimum(self._fed, [len(past) for past in loop.history])
        for row, reason in enumerate(self._reasons):
            # The logits after a row's last token are wanted, so that one is fed in any case.
            if reason is None:
                self._fed[row] = max(0, min(self._fed[row], rows.lengths[row] - 1))
        if any(len(past) > fed for past, fed in zip(loop.history, self._fed, strict=True)):
            loop.trim(self._fed.tolist())
        fresh: list[list[int]] = []
        drafts: list[Draft | None] = [None] * self.rows
        for row, reason in enumerate(self._reasons):
            waits = reason is not None and self._fed[row] > 0 and not everything
            # The last token of a full context was generated, but does not fit.
            waits = waits or rows.lengths[row] > self._rules.context_tokens
            fresh.append([] if waits else rows.tokens(row, int(self._fed[row])).tolist())
            if self.proposer and reason is None and self._new_tokens(row) and not everything:
                drafts[row] = self._draft(self.proposer, row)
        counts = [len(draft.tokens) if draft else 0 for draft in drafts]
        self.runs += 1
        if not any(counts):
            self._logits = loop.append(fresh)
        else:
            keep = 1 + max(counts)
            offered = [
                [*new, *(draft.tokens if draft else ())] for new, draft in zip(fresh, drafts, strict=True)
            ]
            found = loop.append(offered, keep=keep)
            self._logits = np.stack([found[row, keep - 1 - count] for row, count in enumerate(counts)])
            for row, draft in enumerate(drafts):
                if draft is not None:
                    logits = found[row, keep - counts[row] :]
                    self._ahead[row] = _Ahead(list(draft.tokens), draft.probabilities, logits)
        for row, new in enumerate(fresh):
            if new:
                self._fed[row] = rows.lengths[row]

    def _draft(self, proposer: Proposer, row: int) -> Draft | None:
        """Return what may come next in ``row``, as far as it can be of use."""
        length = int(self._rows.lengths[row])
        room = min(
            self._limit(row) - self._new_tokens(row) - 1,
            self._rules.context_tokens - length,
            self._settings.draft_tokens,
        )
        switch = self.loop.switch_tokens
        if switch is not None and length <= switch:
            # Drafts must not turn the whole text over to another rotation before it gets there itself.
            room = min(room, switch - length)
        if room < 1:
            return None
        draft = proposer.propose(row, self._rows.tokens(row), room, self._randoms[row])
        self.proposed_tokens += len(draft.tokens) if draft else 0
        return draft

    def _step_beams(self, beams: Beams, logits: Logits) -> Tokens:
        tokens, parents = beams.step(self._rows.history, logits)
        self._select(parents)
        for row, token in enumerate(tokens.tolist()):
            if self._reasons[row] is not None:
                tokens[row] = -1
                continue
            self._rows.put(row, token)
            if beams.ended[row // self._each]:
                self._reasons[row] = "length"
        self._drop_logits()
        return tokens
