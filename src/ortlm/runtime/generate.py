"""The language model: an artifact, loaded, that turns prompts into text.

lm = load("phi")
print(lm.generate("The capital of France is", max_new_tokens=16))
for step in lm.stream([{"role": "user", "content": "Hello"}], temperature=0.7):
    print(step.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Union, cast

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import Artifact, graph_named, open_artifact
from ortlm.errors import BadArtifact, BadOption, ContextFull, nearest
from ortlm.runtime.cache import Shapes, bytes_per_token, state_shapes
from ortlm.runtime.chat import ChatTemplate, Message
from ortlm.runtime.loop import Loop
from ortlm.runtime.processors import Logits, from_settings
from ortlm.runtime.sampler import greedy, multinomial
from ortlm.runtime.search import FinishReason, Sampling
from ortlm.runtime.session import Session
from ortlm.runtime.settings import Settings
from ortlm.runtime.stop import StopTexts
from ortlm.runtime.tokenizer import Tokenizer

Prompt = Union[str, Sequence[Message], Sequence[int]]  # noqa: UP007 - evaluated at run time


@dataclass(slots=True)
class Timings:
    """What a generation cost. Seconds are wall clock.

    ``prompt_tokens`` were given, ``cached_tokens`` of them came from the cache of the call before.
    ``prompt_seconds`` lasts until the first logits, ``decode_seconds`` is all after them, in which
    ``decode_steps`` further runs of the model were made.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, without the prompt; 0 if there was no step."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        """Return all figures under their names."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token: the text that is complete with it, perhaps empty.

    The last step of a stream says why it ended: "stop" (a stop token or stop text) or "length"
    (max_new_tokens or the context). If no token was generated, its ``token_id`` is None.
    """

    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer. ``str()`` of it is the text.

    ``token_ids`` are all generated tokens, the stop token included; ``text`` ends before it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings = field(default_factory=Timings)

    def __str__(self) -> str:
        return self.text


class LanguageModel:
    """An artifact that is loaded and ready to generate.

    May be used by several threads: every generation has a cache of its own.
    """

    def __init__(
        self, artifact: Artifact, *, threads: int | None = None, providers: Sequence[str] | None = None
    ) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest
        self._graph = graph_named(self.manifest, "decoder")
        self.session = Session(
            artifact.graph_path("decoder"),
            threads=threads,
            providers=providers,
            options=self.manifest.session_options,
        )
        self._check_tensors()
        if "input_ids" not in self._graph.inputs:
            raise BadArtifact(
                f"{artifact.path} needs embeddings as input; only token ids are supported so far."
            )
        if "attention_mask" not in self._graph.inputs:
            raise BadArtifact(f"{artifact.path} names no input for the attention mask.")
        logits = self._graph.outputs.get("logits", "")
        if logits not in self.session.outputs:
            raise BadArtifact(f"{artifact.graph_path('decoder')} has no output for logits.")
        self.vocab_size = self.session.outputs[logits].shape[2] or self.manifest.vocab_size
        self._kept: list[Loop] = []

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer. Raises BadArtifact if it has none."""
        return Tokenizer.open(self.artifact.path)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The artifact's chat template, or None."""
        return ChatTemplate.open(self.artifact.path, self.tokenizer.special_tokens)

    @cached_property
    def _unknown_ids(self) -> NDArray[np.int64] | None:
        if not (self.artifact.path / "tokenizer.json").is_file():
            return None
        return self.tokenizer.unknown_ids(self.vocab_size)

    @cached_property
    def _shapes(self) -> Shapes:
        return state_shapes(self.session, self._graph)

    @property
    def cache_bytes_per_token(self) -> int:
        """How many bytes of cache one token takes."""
        return bytes_per_token(self.session, self._graph.states, self._shapes)

    def loop(self) -> Loop:
        """Return a new decode loop over raw token ids."""
        return Loop(
            self.session,
            self._graph,
            context_tokens=self.manifest.context_tokens,
            switch_tokens=self.manifest.rope_switch_tokens,
            shapes=self._shapes,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a text, of chat messages, or of ids themselves.

        Raises BadOption for an empty prompt, ids outside the vocabulary or messages without a template.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, (bytes, Mapping)) or not hasattr(prompt, "__len__"):
            raise BadOption(
                f"a prompt is a text, a list of messages or a list of token ids; found {type(prompt).__name__}."
            )
        elif len(prompt) and isinstance(prompt[0], Mapping):
            messages = cast("Sequence[Message]", prompt)
            ids = self.tokenizer.encode(self.render(messages), add_special_tokens=False)
        else:
            ids = [_token_id(token) for token in prompt]
        if not ids:
            raise BadOption("the prompt is empty: there must be at least one token to continue.")
        self._check_ids(ids)
        return ids

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt that the chat template makes of ``messages``."""
        if self.chat_template is None:
            raise BadOption(
                f"{self.artifact.path} has no chat template, so messages cannot be turned into a prompt. "
                "Give the prompt as one text, or put the publisher's chat_template.jinja into the folder."
            )
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def generate(
        self,
        prompt: Prompt,
        *,
        settings: Settings | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool | None = None,
        reuse_cache: bool = False,
    ) -> Generation:
        """Continue ``prompt`` and return the whole answer.

        ``prompt`` is a text, a list of chat messages, or a list of token ids. The other options are those of
        Settings; what is given here wins over ``settings``. ``reuse_cache`` begins from what the last call
        with it computed, as far as the prompts agree: for conversations. Results may then differ from a
        fresh start in the last digits.
        Raises ContextFull if the prompt alone is longer than the context, BadOption for unusable values.
        """
        timings = Timings()
        steps = list(
            self.stream(
                prompt,
                settings=settings,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop,
                ignore_eos=ignore_eos,
                reuse_cache=reuse_cache,
                timings=timings,
            )
        )
        return Generation(
            text="".join(step.text for step in steps),
            token_ids=tuple(step.token_id for step in steps if step.token_id is not None),
            finish_reason=steps[-1].finish_reason or "length",
            timings=timings,
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        settings: Settings | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool | None = None,
        reuse_cache: bool = False,
        timings: Timings | None = None,
    ) -> Iterator[Step]:
        """Continue ``prompt`` and yield a Step per token; options as for ``generate``.

        ``timings`` is filled while the stream runs. Bad values are reported at once, not at the first step.
        """
        given = Settings(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=() if stop is None else stop,
            ignore_eos=bool(ignore_eos),
        )
        wanted = given.over(settings) if settings is not None else given
        ids = self.encode(prompt)
        self._check_length(ids)
        return self._stream(ids, wanted, Timings() if timings is None else timings, reuse_cache=reuse_cache)

    def logits(self, ids: Sequence[int]) -> Logits:
        """Return the logits after every token of ``ids``, float32 [S, V]."""
        tokens = self.encode(ids)
        loop = self.loop()
        loop.start()
        found: Logits = loop.append([tokens], all_logits=True)[0]
        return found

    def logits_batch(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]] | None = None
    ) -> Logits:
        """Return logits of several rows, float32 [B, 1 + N, V], for checks against other implementations.

        The prompts may differ in length. The first logits follow each prompt's last token; then the N tokens
        of each row's continuation are fed one at a time.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        more = [list(row) for row in continuations or [[] for _ in rows]]
        if len(more) != len(rows) or len({len(row) for row in more}) > 1:
            raise BadOption("continuations must have one row per prompt, all of the same length.")
        for row in more:
            self._check_ids(row)
        loop = self.loop()
        loop.start(len(rows))
        found = [loop.append(rows)]
        found += [loop.step(np.array(tokens, dtype=np.int64)) for tokens in zip(*more, strict=True)]
        return np.stack(found, axis=1)

    def _check_tensors(self) -> None:
        """Raise BadArtifact if the configuration names a tensor that the graph has not."""
        graph, session = self._graph, self.session
        for what, named, there in (
            ("input", graph.inputs, {**session.inputs, **session.optional}),
            ("output", graph.outputs, session.outputs),
            ("optional input", graph.optional, session.optional),
        ):
            for role, name in named.items():
                if name not in there:
                    raise BadArtifact(
                        f"{graph.file} has no {what} {name!r}, which the artifact's configuration names as {role}."
                        + nearest(name, there)
                    )

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not self.vocab_size:
            return
        for at, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise BadOption(
                    f"token id {token} at index {at} is outside the vocabulary 0 … {self.vocab_size - 1}."
                )

    def _check_length(self, ids: Sequence[int]) -> None:
        context = self.manifest.context_tokens
        if len(ids) > context:
            raise ContextFull(f"the prompt has {len(ids)} tokens, but the model's context holds {context}.")

    def _stream(
        self, ids: list[int], settings: Settings, timings: Timings, *, reuse_cache: bool
    ) -> Iterator[Step]:
        settings = settings.with_defaults(self.manifest.generation)
        stop_ids = {*settings.stop_token_ids, *(() if settings.ignore_eos else self.manifest.stop_token_ids)}
        # The last token that fits is generated, but never fed.
        room = self.manifest.context_tokens - len(ids) + 1
        limit = room if settings.max_new_tokens is None else min(room, settings.max_new_tokens)
        timings.prompt_tokens = len(ids)
        search = Sampling(
            [ids],
            processors=from_settings(settings, unknown_ids=self._unknown_ids),
            sampler=multinomial if settings.samples else greedy,
            seed=settings.seed,
            stop_ids=stop_ids,
            max_new_tokens=limit,
        )
        if search.finished:
            yield Step("", None, "length")
            return
        words = _Words(self._text_tokenizer(settings), ids, settings.stop)
        loop = self._take_loop(ids, timings) if reuse_cache else self.loop()
        if not loop.history:
            loop.start()
        begun, recomputed = time.perf_counter(), loop.recomputed
        logits = loop.append([ids[loop.length :]])
        if loop.recomputed > recomputed:
            timings.cached_tokens = 0
        now = time.perf_counter()
        timings.prompt_seconds = now - begun
        try:
            while True:
                token = int(search.step(logits)[0])
                timings.new_tokens += 1
                stopped = token in stop_ids
                text = words.end() if stopped else words.push(token)
                if words.stopped():
                    search.finish(0, "stop")
                done = search.reasons[0]
                if done is not None and not stopped:
                    text += words.end()
                # Whoever takes the steps may be slow; that time is not the model's.
                timings.decode_seconds += time.perf_counter() - now
                yield Step(text, token, done)
                now = time.perf_counter()
                if done is not None:
                    return
                logits = loop.step(np.array([token]))
                timings.decode_steps += 1
        finally:
            if reuse_cache:
                self._kept[:] = [loop]

    def _text_tokenizer(self, settings: Settings) -> Tokenizer | None:
        """Return the tokenizer, None if the artifact has none and nothing asked for needs it."""
        if settings.stop or (self.artifact.path / "tokenizer.json").is_file():
            return self.tokenizer
        return None

    def _take_loop(self, ids: Sequence[int], timings: Timings) -> Loop:
        """Return the loop that was kept, taken back to where ``ids`` differs from it; else a new one."""
        try:
            # pop() is atomic: two threads never get the same loop.
            loop = self._kept.pop()
        except IndexError:
            return self.loop()
        past = loop.history[0]
        agree = next(
            (i for i, (a, b) in enumerate(zip(past, ids, strict=False)) if a != b), min(len(past), len(ids))
        )
        # The logits after the last token are needed, so that one is always fed.
        loop.trim(min(agree, len(ids) - 1))
        timings.cached_tokens = loop.length
        return loop


class _Words:
    """Text of the tokens so far: whole characters, nothing of a stop text."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream(prompt) if tokenizer else None
        self._texts = StopTexts(stop)

    def stopped(self) -> bool:
        """Return whether a stop text occurred."""
        return self._texts.found is not None

    def push(self, token: int) -> str:
        return self._texts.push(self._stream.push(token)) if self._stream else ""

    def end(self) -> str:
        """Return what was held back."""
        if self._stream is None:
            return ""
        return self._texts.push(self._stream.flush()) + self._texts.flush()


def load(
    path: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None
) -> LanguageModel:
    """Load the artifact in ``path``, ours or one made for onnxruntime-genai.

    ``threads``: for one operator; by default the physical cores. ``providers``: ONNX Runtime's execution
    providers in order of preference, for example ["cuda"]; by default the CPU.
    Raises BadArtifact if the folder is no artifact or is damaged.
    """
    return LanguageModel(open_artifact(path), threads=threads, providers=providers)


def _token_id(token: object) -> int:
    if isinstance(token, (int, np.integer)) and not isinstance(token, bool):
        return int(token)
    raise BadOption(
        f"a prompt is a text, a list of messages or a list of token ids; found {token!r} in a list."
    )
