"""``POST /v1/completions``: texts and token ids to be continued, with log-probabilities of the prompt too."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ortlm.errors import BadOption
from ortlm.runtime.generation.stream import Step
from ortlm.runtime.sampling.logprobs import TokenLogprob
from ortlm.server.chat import check_count, check_room, usage
from ortlm.server.errors import ApiError, refused
from ortlm.server.served import ServedModel
from ortlm.server.settings import guidance_of, settings_of
from ortlm.server.stream import DONE, data, merged
from ortlm.server.wire import CompletionBody
from ortlm.serving.request import Request

_MOST_PROMPTS = 256


@dataclass
class Completion:
    """A request for continuations, submitted: those of prompt p are the requests p·n to p·n + n - 1."""

    model: ServedModel
    body: CompletionBody
    texts: list[str]
    requests: list[Request]
    name: str
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def each(self) -> int:
        """How many continuations each prompt has."""
        return len(self.requests) // len(self.texts)


def submit(served: ServedModel, adapter: str | None, body: CompletionBody) -> Completion:
    """Submit what ``body`` asks for. Raises ApiError for what cannot be honored."""
    each = body.n or 1
    if body.best_of is not None and body.best_of != each:
        raise refused("best_of", "best_of is not supported: all n answers are returned. Leave it out.")
    prompts = _prompts(served, body)
    for _, ids in prompts:
        check_room(served, ids, body.max_tokens, "max_tokens", "prompt")
    check_count(served, len(prompts) * each, "n" if each > 1 else "prompt")
    guidance = guidance_of(body.response_format, body)
    asked_for = (
        (
            ids,
            settings_of(
                body,
                max_tokens=body.max_tokens,
                adapter=adapter,
                guidance=guidance,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
                index=index,
            ),
        )
        for _, ids in prompts
        for index in range(each)
    )
    requests = served.submit_all(asked_for, priority=body.priority or 0)
    label = served.name if adapter is None else f"{served.name}:{adapter}"
    return Completion(served, body, [text for text, _ in prompts], requests, label)


async def answer(completion: Completion) -> dict[str, Any]:
    """Wait for all continuations and return the object ``text_completion``."""
    steps: list[list[Step]] = [[] for _ in completion.requests]
    async for index, step in merged(completion.requests):
        steps[index].append(step)
    choices = []
    for index, request in enumerate(completion.requests):
        made = request.generation(steps[index])
        prompt = completion.texts[index // completion.each] if completion.body.echo else ""
        choices.append(
            {
                "index": index,
                "text": prompt + made.text,
                "logprobs": _logprobs(completion, request, made.logprobs),
                "finish_reason": made.finish_reason,
            }
        )
    return {
        **_head(completion),
        "choices": choices,
        "usage": usage(completion.requests, len(completion.texts)),
    }


async def events(completion: Completion) -> AsyncIterator[bytes]:
    """Yield the continuations as server-sent events."""
    body, head = completion.body, _head(completion)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    begun = [False] * len(completion.requests)
    offsets = [0] * len(completion.requests)
    async for index, step in merged(completion.requests):
        request, text, logprobs = completion.requests[index], step.text, None
        found = [step.logprob] if step.logprob is not None else []
        first = not begun[index]
        begun[index] = True
        if first and body.echo:
            text = completion.texts[index // completion.each] + text
        if body.logprobs is not None:
            logprobs = _logprobs(completion, request, found, prompt=first, offset=offsets[index])
            if logprobs is not None and logprobs["tokens"]:
                offsets[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        if not text and not found and step.finish_reason is None:
            continue
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": step.finish_reason}
        yield data({**head, "choices": [choice], **({"usage": None} if wants_usage else {})})
    if wants_usage:
        yield data({**head, "choices": [], "usage": usage(completion.requests, len(completion.texts))})
    yield DONE


def _logprobs(
    completion: Completion,
    request: Request,
    found: Sequence[TokenLogprob],
    *,
    prompt: bool = True,
    offset: int = 0,
) -> dict[str, Any] | None:
    """Return the log-probabilities of the answer's tokens, and before them of the prompt's where it is echoed."""
    if completion.body.logprobs is None:
        return None
    texts = completion.model.texts
    entries: list[tuple[int, TokenLogprob | None]] = []
    if prompt and completion.body.echo:
        entries += zip(request.ids, request.prompt_logprobs, strict=True)
    entries += [(one.token_id, one) for one in found]
    tokens = [texts.text(token) for token, _ in entries]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None if one is None else max(one.logprob, -9999.0) for _, one in entries],
        "top_logprobs": [None if one is None else texts.top(one) for _, one in entries],
        "text_offset": offsets,
    }


def _head(completion: Completion) -> dict[str, Any]:
    return {
        "id": completion.id,
        "object": "text_completion",
        "created": completion.created,
        "model": completion.name,
        "system_fingerprint": None,
    }


def _prompts(served: ServedModel, body: CompletionBody) -> list[tuple[str, list[int]]]:
    """Return each prompt as text and as token ids."""
    given = body.prompt
    many: list[Any] = (
        [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    )
    if not many:
        raise refused("prompt", "prompt is empty; give a text, or a list of token ids.")
    if len(many) > _MOST_PROMPTS:
        raise refused(
            "prompt", f"prompt has {len(many)} texts; at most {_MOST_PROMPTS} are possible at once."
        )
    prompts = []
    tokenizer = served.lm.tokenizer
    try:
        for one in many:
            ids = served.lm.encode(one)
            text = one if isinstance(one, str) else tokenizer.decode(ids, skip_special_tokens=False)
            prompts.append((text, ids))
    except BadOption as error:
        raise ApiError(400, str(error), param="prompt") from error
    return prompts
