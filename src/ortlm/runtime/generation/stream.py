"""From generated tokens to text: what a generation yields while it runs, and what it was in the end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from collections.abc import Generator as PythonGenerator
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from ortlm.errors import Cancelled
from ortlm.runtime.generation.finish import FinishReason
from ortlm.runtime.generation.generator import Generator
from ortlm.runtime.sampling.logprobs import TokenLogprob
from ortlm.runtime.sampling.settings import Settings
from ortlm.runtime.text.stop_strings import StopTexts
from ortlm.runtime.text.tokenizer import Tokenizer

_T = TypeVar("_T")


@dataclass(slots=True)
class Timings:
    """What a generation cost. Seconds are wall clock.

    ``prompt_tokens`` were given, ``cached_tokens`` of them came from the cache of an earlier call.
    ``new_tokens`` are those of all answers. ``image_seconds`` turned images into tokens, 0 without any;
    ``prompt_seconds`` lasts until the first logits, ``decode_seconds`` is all after them; in it
    ``decode_tokens`` came out of ``decode_steps`` runs of the model. ``proposed_tokens`` were drafted,
    ``accepted_tokens`` of them confirmed.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    image_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, without the prompt; 0 if there was no step."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        """Return all figures under their names."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token: ``text`` is what is complete with it, perhaps nothing.

    ``index`` says which answer it belongs to: with n answers to each prompt, answer i to prompt p is p·n + i.
    In the last step of an answer ``finish_reason`` says why it ended: "stop" (a stop token or stop text), "length"
    (the limit or the context) or "cancelled". If no token came with it, ``token_id`` is None. ``logprob`` is there
    if it was asked for.
    """

    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    index: int = 0
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer. ``str()`` of it is the text.

    ``token_ids`` are all generated tokens, the stop token included; ``text`` ends before it. ``finish_reason`` is
    "stop" (a stop token or stop text), "length" (the limit or the context) or "cancelled". ``logprobs`` has one
    entry per token if they were asked for, ``prompt_logprobs`` one per token of the prompt, the first None.
    ``score`` is what beam search ranks by. ``alternatives`` are the further answers, if several were asked for.
    ``timings`` are those of all answers together.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings = field(default_factory=Timings)
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    score: float | None = None
    alternatives: tuple[Generation, ...] = ()

    def __str__(self) -> str:
        return self.text


class Stream:
    """An iterator over the Steps of a generation.

    ``timings`` fills while it runs, ``prompt_logprobs`` has a list for each prompt if they were asked for, and
    ``generator`` is what makes the tokens. ``cancel`` may be called from any thread; ``close`` ends it between two
    steps, as leaving the loop and dropping the stream does.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        tokenizer: Tokenizer | None,
        *,
        timings: Timings,
        at_end: Callable[[Generator], None],
    ) -> None:
        self.generator = generator
        self.timings = timings
        self.prompt_logprobs: list[list[TokenLogprob | None]] = []
        self._prompts = prompts
        self._settings = settings
        self._tokenizer = tokenizer
        self._at_end = at_end
        self._cancelled = False
        self._ended = False
        self._lock = threading.Lock()
        self._stopped_by: str | None = None
        self._steps: PythonGenerator[Step, None, None] = self._run()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """Stop here; nothing more comes."""
        self._steps.close()

    def cancel(self) -> None:
        """Stop as soon as possible, even while the model runs; each answer ends as "cancelled"."""
        with self._lock:
            if not self._ended:
                self._cancelled = True
                self.generator.cancel()

    def generations(self) -> list[Generation]:
        """Run to the end and return the answer to each prompt."""
        steps = list(self)
        each = self._settings.num_return_sequences
        scores: dict[int, float | None] = {}
        for number, answers in enumerate(self.generator.answers() if self.generator.rows else ()):
            scores |= {number * each + i: answer.score for i, answer in enumerate(answers)}
        made = [
            self._generation(index, steps, scores.get(index)) for index in range(len(self._prompts) * each)
        ]
        out = []
        for at, prompt in enumerate(self._prompts):
            first, *others = made[at * each : (at + 1) * each]
            logprobs = tuple(self.prompt_logprobs[at]) if self.prompt_logprobs else ()
            assert len(logprobs) in (0, len(prompt))
            out.append(
                Generation(
                    first.text,
                    first.token_ids,
                    first.finish_reason,
                    self.timings,
                    first.logprobs,
                    logprobs,
                    first.score,
                    tuple(others),
                )
            )
        return out

    def _generation(self, index: int, steps: list[Step], score: float | None) -> Generation:
        own = [step for step in steps if step.index == index]
        return Generation(
            text="".join(step.text for step in own),
            token_ids=tuple(step.token_id for step in own if step.token_id is not None),
            finish_reason=(own[-1].finish_reason if own else None)
            or ("cancelled" if self._cancelled else "length"),
            timings=self.timings,
            logprobs=tuple(step.logprob for step in own if step.logprob is not None),
            score=score,
        )

    def _run(self) -> PythonGenerator[Step, None, None]:
        generator, timings = self.generator, self.timings
        begun = time.perf_counter()
        words: list[_Words] = []
        try:
            generator.append(self._prompts)
            now = time.perf_counter()
            timings.prompt_seconds += now - begun
            timings.cached_tokens += generator.cached_tokens
            words = [self._words(self._prompts[row // self._each]) for row in range(generator.rows)]
            if self._settings.num_beams > 1:
                yield from self._beams(now)
                return
            for row in range(generator.rows):
                if generator.finish_reasons[row] is not None:
                    yield Step("", None, generator.finish_reasons[row], row)
            first = True
            while not generator.done:
                tokens = generator.step()
                steps = []
                for row, token in enumerate(tokens.tolist()):
                    if token >= 0:
                        steps.append(self._step(row, token, words[row]))
                timings.new_tokens += len(steps)
                timings.decode_tokens += 0 if first else len(steps)
                first = False
                self._count()
                # Whoever takes the steps may be slow; that time is not the model's.
                timings.decode_seconds += time.perf_counter() - now
                yield from steps
                now = time.perf_counter()
                self._check()
        except Cancelled:
            for row in range(generator.rows or len(self._prompts) * self._settings.num_return_sequences):
                if not generator.rows or generator.finish_reasons[row] is None:
                    if generator.rows:
                        generator.finish(row, "cancelled")
                    yield Step(words[row].end() if row < len(words) else "", None, "cancelled", row)
        finally:
            self._count()
            # What was computed serves the next call, however this one ended.
            with self._lock:
                self._ended = True
                generator.loop.resume()
            self._at_end(generator)

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended the first answer, None if none did."""
        return self._stopped_by

    @property
    def _each(self) -> int:
        return max(self._settings.num_beams, self._settings.num_return_sequences)

    def _check(self) -> None:
        if self._cancelled:
            raise Cancelled("the generation was cancelled.")

    def _count(self) -> None:
        generator, timings = self.generator, self.timings
        timings.decode_steps = max(0, generator.runs - 1)
        timings.proposed_tokens = generator.proposed_tokens
        timings.accepted_tokens = generator.accepted_tokens

    def _words(self, prompt: Sequence[int]) -> _Words:
        return _Words(self._tokenizer, prompt, self._settings.stop)

    def _step(self, row: int, token: int, words: _Words) -> Step:
        generator = self.generator
        reason = generator.finish_reasons[row]
        text = words.end() if token in generator.stop_ids else words.push(token)
        if words.stopped():
            if row == 0:
                self._stopped_by = words.stopped_by
            generator.finish(row, "stop")
        elif reason is not None:
            text += words.end()
        return Step(text, token, generator.finish_reasons[row], row, generator.logprobs[row])

    def _beams(self, now: float) -> Iterator[Step]:
        """Search to the end, then yield the answers token by token: before that, none of them is certain."""
        generator, timings = self.generator, self.timings
        steps = 0
        while not generator.done:
            generator.step()
            steps += 1
            self._check()
        self._count()
        timings.decode_tokens += max(0, steps - 1) * generator.prompts
        timings.decode_seconds += time.perf_counter() - now
        for number, (prompt, answers) in enumerate(zip(self._prompts, generator.answers(), strict=True)):
            for index, answer in enumerate(answers, number * self._settings.num_return_sequences):
                if not answer.token_ids:
                    yield Step("", None, answer.finish_reason or "length", index)
                words = self._words(prompt)
                timings.new_tokens += len(answer.token_ids)
                for at, token in enumerate(answer.token_ids):
                    last = at == len(answer.token_ids) - 1
                    ended = last and answer.finish_reason == "stop"
                    text = words.end() if ended else words.push(token)
                    if last and not ended and not words.stopped():
                        text += words.end()
                    stopped = words.stopped() or ended
                    reason: FinishReason | None = (
                        "stop" if stopped else answer.finish_reason if last else None
                    )
                    yield Step(text, token, reason, index)
                    if stopped:
                        break


class _Words:
    """Text of the tokens so far: whole characters, nothing of a stop text."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream(prompt) if tokenizer else None
        self._texts = StopTexts(stop)

    @property
    def stopped_by(self) -> str | None:
        """The stop text that occurred."""
        return self._texts.found

    def stopped(self) -> bool:
        """Return whether a stop text occurred."""
        return self._texts.found is not None

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now."""
        return self._texts.push(self._stream.push(token)) if self._stream else ""

    def end(self) -> str:
        """Return what was held back."""
        if self._stream is None:
            return ""
        return self._texts.push(self._stream.flush()) + self._texts.flush()


async def in_thread(stream: Stream, work: Callable[[], _T]) -> _T:
    """Return what ``work`` does with ``stream`` in another thread; a task that is cancelled cancels the stream."""
    # Few programs have a loop, and importing it takes a tenth of the time to import everything.
    import asyncio

    pending = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(pending)
    except asyncio.CancelledError:
        stream.cancel()
        # The model stops within one operator; its thread must be out before the stream is closed.
        while not pending.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([pending])
        raise


async def astream(stream: Stream) -> AsyncIterator[Step]:
    """Yield the steps of ``stream``, each computed in another thread; leaving the loop cancels it."""
    try:
        while True:
            step = await in_thread(stream, lambda: next(stream, None))
            if step is None:
                return
            yield step
    finally:
        stream.close()
