"""``POST /v1/chat/completions``, and what else is made of messages."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ortlm.errors import BadOption
from ortlm.runtime.engine.token_ids import has_images
from ortlm.runtime.sampling.logprobs import TokenLogprob
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.server.answer import AnswerParts
from ortlm.server.errors import ApiError, refused
from ortlm.server.served import ServedModel
from ortlm.server.settings import guidance_of, settings_of
from ortlm.server.stream import DONE, data, merged
from ortlm.server.tools import Call, ToolFormat, calls_text, forced
from ortlm.server.wire import ChatBody, ToolChoice, first_given
from ortlm.serving.request import Request

# A template that writes whatever role a message has.
_WRITES_ROLE = re.compile(r"(\+|~|\{\{-?)\s*message(\.role|\[['\"]role['\"]\])")
_TOOL_ROLE = re.compile(r"['\"]tool['\"]")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# What a chat template is given by fields of the request, or not at all.
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass
class Chat:
    """A request for answers to messages, submitted: ``requests`` has one for each answer."""

    model: ServedModel
    body: ChatBody
    requests: list[Request]
    parts: list[AnswerParts]
    name: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class _Tools:
    """What the prompt says of tools, and how calls of them are found; ``guidance`` makes the answer one."""

    shown: list[dict[str, Any]] | None = None
    form: ToolFormat | None = None
    guidance: Guidance | None = None


def submit(served: ServedModel, adapter: str | None, body: ChatBody) -> Chat:
    """Submit what ``body`` asks for. Raises ApiError for what cannot be honored."""
    tools = _tools(served, body)
    text, ids = _prompt(served, body, tools.shown)
    if body.return_token_ids and has_images(ids):
        raise refused("return_token_ids", "return_token_ids does not go with images, which are no tokens.")
    name, most = first_given(max_completion_tokens=body.max_completion_tokens, max_tokens=body.max_tokens)
    check_room(served, ids, most, name)
    check_count(served, body.n or 1, "n")
    asked = guidance_of(body.response_format, body)
    if asked is not None and tools.guidance is not None:
        raise refused(
            "response_format", "response_format does not go with a tool_choice that asks for a call."
        )
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs", "top_logprobs needs logprobs: true.")
    guidance = asked or tools.guidance
    template = served.lm.chat_template
    source = "" if template is None else "".join(template.templates.values())
    # Some templates leave the first mark to the model, and only drop what it has closed.
    thinks = guidance is None and ("<think>" in source or "</think>" in source)
    asked_for = (
        settings_of(
            body,
            max_tokens=most,
            adapter=adapter,
            guidance=guidance,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            index=index,
        )
        for index in range(body.n or 1)
    )
    requests = served.submit_all(((ids, settings) for settings in asked_for), priority=body.priority or 0)
    parts = [
        AnswerParts(
            served.lm.tokenizer,
            tools=tools.form,
            thinks=thinks,
            begun=thinks and text.rstrip().endswith("<think>"),
            names={tool.function.name for tool in body.tools or ()},
            stop_ids=request.stream.generator.stop_ids,
        )
        for request in requests
    ]
    label = served.name if adapter is None else f"{served.name}:{adapter}"
    return Chat(served, body, requests, parts, label)


async def answer(chat: Chat) -> dict[str, Any]:
    """Wait for all answers and return the object ``chat.completion``."""
    count = len(chat.requests)
    contents, reasonings = [""] * count, [""] * count
    calls: list[list[Call]] = [[] for _ in range(count)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
    ids: list[list[int]] = [[] for _ in range(count)]
    async for index, step in merged(chat.requests):
        delta = chat.parts[index].push(step)
        contents[index] += delta.content
        reasonings[index] += delta.reasoning
        calls[index] += delta.calls
        if step.logprob is not None:
            logprobs[index].append(step.logprob)
        if step.token_id is not None:
            ids[index].append(step.token_id)
    choices = []
    for index, request in enumerate(chat.requests):
        message: dict[str, Any] = {"role": "assistant", "content": contents[index], "refusal": None}
        if reasonings[index]:
            message["reasoning_content"] = reasonings[index]
        kept = kept_calls(chat.body, calls[index])
        if kept:
            message["content"] = contents[index].strip() or None
            message["tool_calls"] = [_call(call) for call in kept]
        texts = chat.model.texts
        choices.append(
            {
                "index": index,
                "message": message,
                "finish_reason": _reason(request, kept),
                "logprobs": {"content": [texts.chat(one) for one in logprobs[index]], "refusal": None}
                if chat.body.logprobs
                else None,
                **({"token_ids": ids[index]} if chat.body.return_token_ids else {}),
            }
        )
    prompt = {"prompt_token_ids": list(chat.requests[0].ids)} if chat.body.return_token_ids else {}
    return {**_head(chat, "chat.completion"), **prompt, "choices": choices, "usage": _usage(chat)}


async def events(chat: Chat) -> AsyncIterator[bytes]:
    """Yield the answers as server-sent events of ``chat.completion.chunk``."""
    wants_usage = chat.body.stream_options is not None and chat.body.stream_options.include_usage
    head = _head(chat, "chat.completion.chunk")
    texts = chat.model.texts

    shows_ids = bool(chat.body.return_token_ids)
    # Since the last chunk of each answer.
    ids: list[list[int]] = [[] for _ in chat.requests]

    def chunk(
        index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if shows_ids:
            choice["token_ids"], ids[index] = ids[index], []
        return data({**head, **more, "choices": [choice], **({"usage": None} if wants_usage else {})})

    for index, request in enumerate(chat.requests):
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.ids)} if shows_ids else {}
        yield chunk(index, {"role": "assistant", "content": ""}, **prompt)
    held: list[list[TokenLogprob]] = [[] for _ in chat.requests]
    async for index, step in merged(chat.requests):
        delta = chat.parts[index].push(step)
        if step.logprob is not None:
            held[index].append(step.logprob)
        if step.token_id is not None:
            ids[index].append(step.token_id)
        fields: dict[str, Any] = {}
        if delta.content:
            fields["content"] = delta.content
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        last = step.finish_reason is not None
        if fields or (last and held[index]):
            found = {"content": [texts.chat(one) for one in held[index]], "refusal": None}
            yield chunk(index, fields, logprobs=found if chat.body.logprobs else None)
            held[index] = []
        if not last:
            continue
        kept = kept_calls(chat.body, delta.calls)
        for number, call in enumerate(kept):
            yield chunk(index, {"tool_calls": [{"index": number, **_call(call)}]})
        yield chunk(index, {}, _reason(step, kept))
    if wants_usage:
        yield data({**head, "choices": [], "usage": _usage(chat)})
    yield DONE


def _usage(chat: Chat) -> dict[str, Any]:
    reasoning = sum(parts.reasoning_tokens for parts in chat.parts)
    return {**usage(chat.requests), "completion_tokens_details": {"reasoning_tokens": reasoning}}


def usage(requests: Sequence[Request], prompts: int = 1) -> dict[str, Any]:
    """Return the tokens of all ``requests``, which are several answers to each of ``prompts``."""
    each = len(requests) // prompts
    firsts = requests[::each]
    prompt = sum(len(request.ids) for request in firsts)
    new = sum(request.timings.new_tokens for request in requests)
    cached = sum(request.cached_tokens for request in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def check_count(served: ServedModel, count: int, name: str) -> None:
    """Raise ApiError for more answers at once than can run and wait: trying again would not help."""
    options = served.engine.options
    if count > options.batch + options.queue:
        raise refused(
            name,
            f"{count} answers are asked for at once, but no more than {options.batch + options.queue} can run and "
            "wait here. Ask for fewer.",
        )


def check_room(
    served: ServedModel, ids: Sequence[int], most: int | None, name: str, prompt: str = "messages"
) -> None:
    """Raise ApiError if a prompt and the answer that is asked for do not fit into the context."""
    context = served.engine.context_tokens
    if len(ids) > context or (most and len(ids) + most > context + 1):
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens"
            + (f" and {name} is {most}" if most else "")
            + f", but the context holds {context}. Shorten the prompt or lower {name}.",
            param=name if len(ids) <= context else prompt,
            code="context_length_exceeded",
        )


def _head(chat: Chat, kind: str) -> dict[str, Any]:
    return {
        "id": chat.id,
        "object": kind,
        "created": chat.created,
        "model": chat.name,
        "system_fingerprint": None,
    }


def _reason(ended: Any, calls: Sequence[Call]) -> str:
    reason: str = ended.finish_reason or "stop"
    return "tool_calls" if calls and reason != "length" else reason


def kept_calls(body: ChatBody, calls: Sequence[Call]) -> Sequence[Call]:
    """Return those of ``calls`` that ``body`` wants: one, if they may not be made in parallel."""
    return calls[:1] if body.parallel_tool_calls is False else calls


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tools(served: ServedModel, body: ChatBody) -> _Tools:
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise refused("tool_choice", "tool_choice asks for a call, but there are no tools.")
        return _Tools()
    if choice == "none":
        return _Tools()
    form = served.tool_format
    if form is None:
        raise refused("tools", f"the chat template of {served.name} takes no tools. Leave them out.")
    functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools]
    # The model is not told; what it writes is held to the schema.
    plain = [{key: value for key, value in one.items() if key != "strict"} for one in functions]
    shown = [
        {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **one}}
        for one in plain
    ]
    if choice in (None, "auto"):
        if any(tool.function.strict for tool in body.tools):
            raise refused(
                "tools",
                'strict tools need a call that is asked for: set tool_choice to "required" or to a function, or '
                "leave out strict.",
            )
        return _Tools(shown, form)
    if isinstance(choice, ToolChoice):
        plain = [one for one in plain if one["name"] == choice.function.name]
        if not plain:
            raise refused(
                "tool_choice", f"tool_choice names {choice.function.name!r}, which is not among tools."
            )
    parallel = choice == "required" and body.parallel_tool_calls is not False
    try:
        return _Tools(shown, form, forced(form, plain, parallel=parallel))
    except BadOption as error:
        raise ApiError(400, str(error), param="tools") from error


def _prompt(served: ServedModel, body: ChatBody, tools: list[dict[str, Any]] | None) -> tuple[str, list[int]]:
    """Return the prompt of the messages as text, and as token ids."""
    template = served.lm.chat_template
    if template is None:
        raise refused("messages", f"{served.name} has no chat template. Use /v1/completions.")
    variables = dict(body.chat_template_kwargs or {})
    read = {name for form in template.templates for name in template.facts(form).variables}
    for key in variables:
        if key in _OWN_VARIABLES or key not in read:
            said = "is a field of its own" if key in _OWN_VARIABLES else "is not read by the chat template"
            raise refused("chat_template_kwargs", f"chat_template_kwargs: {key[:64]!r} {said}. Leave it out.")
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in read:
            raise refused("reasoning_effort", f"{served.name} knows no reasoning_effort. Leave it out.")
        variables["reasoning_effort"] = body.reasoning_effort
    messages = [checked_message(served, number, message) for number, message in enumerate(body.messages)]
    add = (
        body.add_generation_prompt
        if body.add_generation_prompt is not None
        else not body.continue_final_message
    )
    shows = any(
        isinstance(part, Mapping) and part.get("type") in ("image", "image_url")
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
    try:
        if shows:
            if served.lm.vision_encoder is None:
                raise refused(
                    "messages", f"{served.name} is a text model: it takes no images. Leave them out."
                )
            for name, value in (
                ("tools", tools), ("chat_template_kwargs", variables), ("continue_final_message", not add)
            ):  # fmt: skip
                if value:
                    raise refused(name, f"{name} does not go with images.")
            return "", served.lm.encode(messages)
        form = served.tool_format
        if tools is not None and form is not None and form.in_system:
            messages, tools = _with_tools(messages, tools), None
        text = template.render(
            messages,
            tools=tools,
            add_generation_prompt=add,
            continue_final_message=bool(body.continue_final_message),
            variables=variables,
        )
    except BadOption as error:
        raise ApiError(400, str(error), param="messages") from error
    return text, served.lm.tokenizer.encode(text, add_special_tokens=False)


def _with_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``messages`` with ``tools`` in that of the system, which is where some templates read them."""
    text = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    first = messages[0] if messages[0].get("role") == "system" else {"role": "system", "content": ""}
    return [{**first, "tools": text}, *messages[first is messages[0] :]]


def checked_message(served: ServedModel, number: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as values, which is what templates take.

    Raises ApiError for what a template would leave out without a word.
    """
    made, where = dict(message), f"messages.{number}"
    template = served.lm.chat_template
    source = "" if template is None else "".join(template.templates.values())
    role, calls = made.get("role"), made.get("tool_calls")
    if role == "developer":
        made["role"] = role = "system"
    named = _WRITES_ROLE.search(source) is not None
    if role not in _ROLES and not (isinstance(role, str) and (named or repr(role) in source)):
        raise refused(f"{where}.role", f"role must be one of {', '.join(_ROLES)}; found {str(role)[:64]!r}.")
    if (role == "tool" and not named and _TOOL_ROLE.search(source) is None) or (
        calls and not _takes_calls(served)
    ):
        raise refused(where, f"the chat template of {served.name} takes no calls of tools and no results.")
    if calls is not None:
        if not isinstance(calls, list):
            raise refused(f"{where}.tool_calls", "tool_calls must be a list.")
        made["tool_calls"] = [_with_values(call, f"{where}.tool_calls") for call in calls]
    if made.get("content") is None and calls:
        made["content"] = ""
    form = served.tool_format
    if calls and form is not None and not form.written:
        made["content"] = _text(made["content"], where) + calls_text(form, made.pop("tool_calls"))
    return made


def _takes_calls(served: ServedModel) -> bool:
    """Return whether the chat template writes calls of tools, or is known to leave them to the content."""
    template = served.lm.chat_template
    reads = template is not None and any(
        "tool_calls" in template.facts(name).names for name in template.templates
    )
    return reads or served.tool_format is not None


def _text(content: Any, where: str) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise refused(f"{where}.content", "the content of a message with tool_calls must be text.")
    return "".join(map(str, texts))


def _with_values(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise refused(where, "a call needs a function with a name.")
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call
