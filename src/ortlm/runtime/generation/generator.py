"""The generation loop, token by token, with everything between two tokens open to change.

generator = lm.generator(temperature=0.7, max_new_tokens=64)
generator.append(lm.encode("The capital of France is"))
while not generator.done:
    token = generator.step()[0]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import BadOption, CannotRewind, ContextFull
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.prompt_cache import restore, save
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN, common_prefix_length, has_images
from ortlm.runtime.engine.types import Logits, Tokens
from ortlm.runtime.generation.batch import TokenRows, as_lengths, as_rows
from ortlm.runtime.generation.decoding import (
    Decoding,
    GuidedRow,
    answer_limits,
    guided_row,
    guided_rows,
    resolved,
    row_randoms,
    stop_ids_of,
)
from ortlm.runtime.generation.finish import FinishReason, FinishReasons, answer_limit
from ortlm.runtime.generation.rules import Rules
from ortlm.runtime.generation.speculative import Draft, Proposer
from ortlm.runtime.generation.verification import Verification, draft_room
from ortlm.runtime.sampling.beam_search import Beams
from ortlm.runtime.sampling.logprobs import TokenLogprob, token_logprob
from ortlm.runtime.sampling.sampler import draw_among, greedy, multinomial
from ortlm.runtime.sampling.settings import Options, Settings
from ortlm.runtime.structured_output.guidance import Guidance

if TYPE_CHECKING:
    from typing import Unpack


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated for a prompt: the new tokens, a stop token included, and why it ended.

    ``finish_reason`` is None if it has not. ``score`` is what beam search ranks by, None without beams.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    score: float | None = None


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
        self._reasons = FinishReasons()
        self._logits: Logits | None = None
        # The loop has them, and nobody has asked for them.
        self._unread = False
        self._verification = Verification()
        self._beams: Beams | None = None
        self.proposer: Proposer | None = None
        self.prompts = 0
        self.cached_tokens = 0
        self.runs = 0
        self.mixed = False
        self.logprobs: list[TokenLogprob | None] = []
        self._bound, self._gaps = rules.bound, rules.gaps
        self._decoding = self._decoding_for(settings, None)

    # --- what there is ----------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many answers are generated at once; 0 before the first append."""
        return len(self._rows)

    @property
    def done(self) -> bool:
        """Whether no row wants another token; False before the first append."""
        return self.rows > 0 and self._reasons.all_ended

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each row ended: "stop" (stop token or text), "length" or "cancelled"; None if it has not."""
        return list(self._reasons)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._decoding.stop_ids

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, the prompt included."""
        return [int(length) for length in self._rows.lengths]

    @property
    def proposed_tokens(self) -> int:
        """How many tokens were drafted."""
        return self._verification.proposed_tokens

    @property
    def accepted_tokens(self) -> int:
        """How many drafted tokens the model confirmed."""
        return self._verification.accepted_tokens

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
        tokens: list[int] = self._rows.tokens(row).tolist()
        return tokens

    def answers(self) -> list[list[Answer]]:
        """Return what was generated since the last append: the answers to each prompt, best first."""
        if self._beams is not None:
            return [
                [
                    Answer(
                        best.tokens, "stop" if best.stopped else self._reasons[row * self._each], best.score
                    )
                    for best in ranked
                ]
                for row, ranked in enumerate(self._beams.best())
            ]
        made = [Answer(tuple(self._rows.answer(row)), reason) for row, reason in enumerate(self._reasons)]
        return [made[at : at + self._each] for at in range(0, self.rows, self._each)]

    @property
    def settings(self) -> Settings:
        """What is asked for. Assign others, or call ``change``, between any two steps."""
        return self._decoding.asked

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._take(settings)

    def change(self, **options: Unpack[Options]) -> None:
        """Change single settings, given as ``options`` by their names in Settings, from the next token on.

        Raises BadOption for values that cannot be used, and for what is fixed with the first prompt; nothing
        changes then.
        """
        self._take(Settings.of(self._decoding.asked, options))

    def guide(self, guidance: Guidance | None, row: int = 0) -> None:
        """Let ``row`` follow ``guidance`` from its next token on; None lets it go free."""
        self._check_row(row)
        self._guide({row: self._guided(guidance, row)})

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
        self._reasons.end_spent(self._rows, answer_limits(self._decoding.settings, self._rows, self._rules))
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
                self._guide_again(given)
            raise
        if first:
            self._fit()
        else:
            self._guide_again(given)

    def _guide_again(self, given: list[list[int]]) -> None:
        """Let the answers after new tokens begin their form from the start."""
        self._guide(
            {
                row: self._guided(item.guidance, row)
                for row, (more, item) in enumerate(zip(given, self._decoding.guides, strict=True))
                if more and item is not None
            }
        )

    def step(self) -> Tokens:
        """Choose the next token of every row and return them, int64 [rows]; -1 for rows that have ended.

        The model runs if the logits are not there yet. With ``logprobs`` asked for, ``generator.logprobs`` are
        those of this step. Raises BadOption if there is nothing to continue.
        """
        if self.done:
            raise BadOption("every row has ended; append tokens, rewind or change the settings to continue.")
        taken = self._most_likely()
        if taken is not None:
            self.logprobs = [None] * self.rows
            return self._take_tokens(taken)
        logits = self._current()
        if self._beams is not None:
            return self._step_beams(self._beams, logits)
        decoding, ended = self._decoding, self._reasons.ended
        processed = logits
        for process in decoding.processors:
            processed = process(self._rows.history, processed)
        if ended and processed is not logits:
            # Rows that have ended are not chosen for; what is forbidden there is nobody's trouble.
            processed = processed.copy()
            processed[ended] = logits[ended]
        tokens = self._choose(decoding, processed)
        top = decoding.settings.logprobs
        if top is None:
            self.logprobs = [None] * self.rows
        else:
            self.logprobs = [
                None if reason is not None else token_logprob(logits[row], int(tokens[row]), top)
                for row, reason in enumerate(self._reasons)
            ]
        return self._take_tokens(tokens)

    def _most_likely(self) -> Tokens | None:
        """Return each row's most likely token, looked for where the logits are; None if they are wanted here."""
        if not self._decoding.wants_tokens_only or self._beams is not None or not self.rows:
            return None
        if self._logits is None and not self._unread:
            self._feed()
        if not self._unread:
            return None
        tokens = self.loop.most_likely()
        if tokens is None or (self._bound is not None and int(tokens.max()) >= self._bound):
            return None
        return None if self._gaps is not None and self._gaps[tokens].any() else tokens

    def _take_tokens(self, tokens: Tokens) -> Tokens:
        """Give every row its next one of ``tokens``, and return them with -1 for rows that had ended."""
        decoding, ended = self._decoding, self._reasons.ended
        if ended:
            tokens[ended] = -1
        chosen, rows = tokens.tolist(), self._rows
        rows.put_each(chosen)
        self._reasons.after_step(
            chosen,
            [
                length - start
                for length, start in zip(rows.lengths.tolist(), rows.starts.tolist(), strict=True)
            ],
            decoding.limits,
            stop_ids=decoding.stop_ids,
            is_complete=self._is_complete,
        )
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
        shape, assigned = self._current().shape, np.array(logits, dtype=np.float32)
        if assigned.shape != shape:
            raise BadOption(f"logits must have shape {list(shape)}, found {list(assigned.shape)}.")
        self._logits = assigned

    def _current(self) -> Logits:
        if not self.rows:
            raise BadOption("there is a row without a prompt; append its tokens first.")
        if self._logits is None and not self._unread:
            self._feed()
        if self._unread:
            self._logits, self._unread = self.loop.read_logits(), False
        assert self._logits is not None
        return self._logits

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Rewind to ``lengths`` tokens, all rows alike or row by row; what follows is generated again.

        Raises CannotRewind for more tokens than there are, and for beams.
        """
        if self._beams is not None:
            raise CannotRewind("beams have no single past to rewind to; begin a new generator.")
        each = as_lengths(lengths, self._rows)
        if each == self.lengths:
            return
        guides: dict[int, GuidedRow | None] = {}
        for row, length in enumerate(each):
            if self._rows.cut(row, length):
                self._fed[row] = min(int(self._fed[row]), length)
                self._reasons[row] = None
                item = self._decoding.guides[row]
                if item is not None:
                    guides[row] = self._guided(item.guidance, row, min(item.start, length))
        self._drop_logits()
        self._guide(guides)

    def finish(self, row: int, reason: FinishReason) -> None:
        """End ``row`` for a ``reason`` seen from outside, such as a stop text.

        Raises BadOption if there is no such row.
        """
        self._check_row(row)
        self._reasons[row] = reason

    def cancel(self) -> None:
        """End what another thread is doing with this generator, or else its next run, with Cancelled.

        The generator stays usable and resumes from what was computed.
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
        self._fit()

    # --- rows -------------------------------------------------------------------------------------------

    @property
    def _each(self) -> int:
        """Rows to each prompt."""
        return self._decoding.each

    def _fingerprint(self) -> str:
        make = self._rules.fingerprint
        return make(self._decoding.settings.adapter) if make is not None else ""

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
            self._check_adapter(more, self._decoding.settings)
            # Long prompts are checked one by one only if that finds something.
            inside = min(more) >= 0 and max(more) < (vocab or max(more) + 1)
            for at, token in enumerate(() if inside else more):
                if not 0 <= token < (vocab or token + 1) and not (
                    self._rules.images and token >= FIRST_IMAGE_TOKEN
                ):
                    raise BadOption(
                        f"token id {token} at index {at} is outside the vocabulary 0 … {vocab - 1}."
                    )

    def _arrange(self, count: int) -> None:
        self.prompts = count
        self._rows = TokenRows(count)
        self._fed = np.zeros(count, dtype=np.int64)
        self._reasons = FinishReasons(count)
        self._decoding = replace(self._decoding, guides=(None,) * count)
        self._verification.forget()

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
        settings, each = self._decoding.settings, self._each
        randoms = self._decoding.randoms
        if settings.num_beams > 1:
            seeds = [settings.seed] * self.prompts
            if isinstance(settings.seed, tuple):
                seeds = list(settings.seeds(self.prompts))
            self._beams = Beams(
                prompts=self.prompts,
                settings=settings,
                stop_ids=self._decoding.stop_ids,
                starts=self.lengths,
                limits=answer_limits(settings, self._rows, self._rules),
                processors=(),
                randoms=[np.random.default_rng(seed) for seed in seeds],
            )
        else:
            randoms = row_randoms(settings, self.prompts, each)
        if each > 1:
            self._select(np.repeat(np.arange(self.prompts), each))
        guides = guided_rows(
            settings, self._rows, self.prompts, each, rules=self._rules, stop_ids=self._decoding.stop_ids
        )
        self._decoding = replace(self._decoding, randoms=randoms, guides=guides)

    def _select(self, rows: NDArray[np.int64]) -> None:
        if np.array_equal(rows, np.arange(self.rows)):
            return
        if self._unread:
            # They lie in memory that goes with the states, which others may get when rows move.
            self._current()
        self.loop.trim(self._fed.tolist())
        self.loop.select(rows)
        self._rows.select(rows)
        self._fed = self._fed[rows]
        self._reasons.select(rows)
        guides = self._decoding.guides
        self._decoding = replace(self._decoding, guides=tuple(guides[row] for row in rows))
        self._verification.forget()
        if self._logits is not None:
            self._logits = self._logits[rows]

    def _check_adapter(self, tokens: Sequence[int], settings: Settings) -> None:
        """Refuse images among ``tokens`` without the adapter that they need."""
        needed = self._rules.images_adapter
        if needed not in (None, settings.adapter) and has_images(tokens):
            raise BadOption(
                f"this model computes prompts with images with its adapter {needed!r}; the adapter here is "
                f"{settings.adapter!r}. Ask for adapter={needed!r}."
            )

    # --- settings ---------------------------------------------------------------------------------------

    def _take(self, settings: Settings) -> None:
        """Adopt settings in place of those before; if they cannot be used, nothing changes."""
        before = self._decoding
        self._decoding = self._decoding_for(settings, before)
        if not self.rows:
            return
        if self._reasons.reopen_unspent(self._rows, self._decoding.limits):
            self._drop_logits()
        if self._decoding.settings.adapter != before.settings.adapter:
            self.mixed = True
            self._drop_logits()
        self._reasons.end_spent(self._rows, self._decoding.limits)

    def _decoding_for(self, asked: Settings, before: Decoding | None) -> Decoding:
        """Return what ``asked`` means for the rows there are, where ``before`` holds, None at the beginning.

        What works for the old settings, draft model and adapter, follows once nothing can be refused any more.
        """
        if self._beams is not None:
            raise BadOption("beams keep the settings that they began with; begin a new generator.")
        rules, rows = self._rules, self._rows
        old = before.settings if before is not None else None
        settings = resolved(asked, rules, fixed=old if self.rows else None)
        stop_ids = stop_ids_of(settings, rules)
        proposer, keeps_proposer = self.proposer, old is not None and settings.draft is old.draft
        if not keeps_proposer:
            proposer = rules.proposer(settings) if rules.proposer is not None else None
        for row in range(self.rows):
            self._check_adapter(self._rows.tokens(row).tolist(), settings)
        adapter_inputs = None
        if settings.adapter != (old.adapter if old is not None else None):
            if rules.adapter is None:
                raise BadOption(f"adapter {settings.adapter!r} is asked for, but this model takes none.")
            adapter_inputs = rules.adapter(settings.adapter)
        decoding = Decoding(asked, settings, stop_ids)
        if before is not None and self.rows:
            randoms, guides = before.randoms, before.guides
            if settings.seed != before.settings.seed:
                randoms = row_randoms(settings, self.prompts, decoding.each)
            if settings.guidance is not before.settings.guidance:
                guides = guided_rows(
                    settings, rows, self.prompts, decoding.each, rules=rules, stop_ids=stop_ids
                )
            elif stop_ids != before.stop_ids:
                guides = tuple(
                    item
                    and guided_row(item.guidance, rows, row, rules=rules, stop_ids=stop_ids, start=item.start)
                    for row, item in enumerate(guides)
                )
            decoding = replace(decoding, randoms=randoms, guides=guides).fitted(rows, rules)
        if keeps_proposer and proposer is not None:
            proposer.adapt(settings)
        if adapter_inputs is not None:
            self.loop.use(adapter_inputs)
        self.proposer = proposer
        return decoding

    def _guided(self, guidance: Guidance | None, row: int, start: int | None = None) -> GuidedRow | None:
        stop_ids = self._decoding.stop_ids
        return guided_row(guidance, self._rows, row, rules=self._rules, stop_ids=stop_ids, start=start)

    def _guide(self, changed: Mapping[int, GuidedRow | None]) -> None:
        """Let each row of ``changed`` follow what stands there, and the others continue as they do."""
        guides = [changed.get(row, item) for row, item in enumerate(self._decoding.guides)]
        self._decoding = replace(self._decoding, guides=tuple(guides))
        self._fit()

    def _fit(self) -> None:
        """Make the processors for the rows as they are now: they know where answers begin."""
        self._decoding = self._decoding.fitted(self._rows, self._rules)
        if self._beams is not None:
            self._beams.processors = self._decoding.processors
        self._reasons.end_spent(self._rows, self._decoding.limits)

    def _is_complete(self, row: int) -> bool:
        """Return whether the row's guidance wants nothing more, which ends it if there is no stop token."""
        item = self._decoding.guides[row]
        return item is not None and item.guide.finished(self._rows.tokens(row, item.start))

    # --- one step ---------------------------------------------------------------------------------------

    def _choose(self, decoding: Decoding, logits: Logits) -> Tokens:
        if decoding.is_greedy:
            return greedy(logits[:, : self._bound], forbidden=self._gaps)
        if decoding.draws_among:
            return draw_among(
                logits[:, : self._bound],
                decoding.randoms,
                count=decoding.settings.top_k or 0,
                warpers=decoding.warpers,
                forbidden=self._gaps,
            )
        tokens = multinomial(logits, decoding.randoms)
        self._verification.redraw(tokens, logits, decoding.randoms)
        return tokens

    def _advance(self, tokens: Tokens) -> None:
        """Take the next logits from those computed ahead, if the draft of every row was right."""
        self._unread = False
        going = [row for row, reason in enumerate(self._reasons) if reason is None]
        confirmed, self._logits = self._verification.advance(tokens, self._logits, going)
        if confirmed:
            self._fed[confirmed] += 1

    def _drop_logits(self) -> None:
        self._logits, self._unread = None, False
        self._verification.forget()

    def _feed(self, *, everything: bool = False) -> None:
        """Feed what the model has not seen of each row, and drafts after it.

        A row that has ended waits: its last token is fed if the conversation continues. ``everything`` feeds that
        too, and no drafts.
        """
        loop, rows = self.loop, self._rows
        if self.proposer is None and not everything:
            tokens = self._next_tokens()
            if tokens is not None:
                # What nearly every step is.
                self.runs += 1
                self._logits = loop.step_unread(tokens)
                self._unread = self._logits is None
                for row, token in enumerate(tokens):
                    if token >= 0:
                        self._fed[row] += 1
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
            if self.proposer and reason is None and rows.answer_length(row) and not everything:
                drafts[row] = self.draft(self.proposer, row)
        counts = [len(draft.tokens) if draft else 0 for draft in drafts]
        self.runs += 1
        if not any(counts):
            self._logits = loop.append_unread(fresh)
            self._unread = self._logits is None
        else:
            keep = 1 + max(counts)
            offered = [
                [*new, *(draft.tokens if draft else ())] for new, draft in zip(fresh, drafts, strict=True)
            ]
            self._logits = self._verification.read(drafts, loop.append(offered, keep=keep))
        for row, new in enumerate(fresh):
            if new:
                self._fed[row] = rows.lengths[row]

    def _next_tokens(self) -> list[int] | None:
        """Return each row's last token, if that is all of it that the model has not seen, -1 for rows that wait.

        None if anything else is to be fed, so that every row has to be looked at.
        """
        fed, lengths = self._fed.tolist(), self._rows.lengths.tolist()
        if max(lengths) > self._rules.context_tokens or [len(past) for past in self.loop.history] != fed:
            return None
        tokens: list[int] = []
        for row, (seen, length, reason) in enumerate(zip(fed, lengths, self._reasons, strict=True)):
            if reason is not None and seen:
                tokens.append(-1)
            elif length == seen + 1:
                tokens.append(int(self._rows.tokens(row, seen)[0]))
            else:
                return None
        return tokens

    def draft(self, proposer: Proposer, row: int = 0) -> Draft | None:
        """Return what ``proposer`` says may come next in ``row``, as far as it can be of use."""
        rows, settings, context = self._rows, self._decoding.settings, self._rules.context_tokens
        limit = answer_limit(settings, prompt_tokens=int(rows.starts[row]), context_tokens=context)
        room = draft_room(
            int(rows.lengths[row]),
            remaining=limit - rows.answer_length(row),
            wanted=settings.draft_tokens,
            context_tokens=context,
            switch_tokens=self.loop.switch_tokens,
        )
        return self._verification.draft(proposer, row, rows.tokens(row), room, self._decoding.randoms[row])

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
