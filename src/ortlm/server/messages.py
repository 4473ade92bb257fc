"""``POST /v1/messages``: Anthropic's API, by way of chat completions."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ortlm.server import chat
from ortlm.server.answer import Delta
from ortlm.server.chat import Chat
from ortlm.server.errors import ApiError, refused
from ortlm.server.served import ServedModel
from ortlm.server.stream import data, merged
from ortlm.server.wire import Body, ChatBody

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "cancelled": "end_turn"}


class MessageTool(BaseModel):
    """A tool that a model may call."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class MessageToolChoice(BaseModel):
    """Whether, and which, tool is to be called."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(BaseModel):
    """Whether the model is to reason first: its template decides, so this can only be off."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["disabled"]


class MessagesBody(Body):
    """``POST /v1/messages``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    system: str | list[dict[str, Any]] | None = None
    temperature: float | int | None = None
    top_p: float | int | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None


def error_body(error: ApiError) -> dict[str, Any]:
    """Return ``error`` as Anthropic's clients know it."""
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    named = error.param is None or error.message.startswith(error.param)
    said = error.message if named else f"{error.param}: {error.message}"
    return {"type": "error", "error": {"type": _TYPES.get(error.status, usual), "message": said}}


def failed(error: ApiError) -> bytes:
    """Return ``error`` as the last event of a stream."""
    return data(error_body(error), "error")


def submit(served: ServedModel, adapter: str | None, body: MessagesBody) -> Chat:
    """Submit what ``body`` asks for. Raises ApiError for what cannot be honored."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text("system", body.system)})
    for number, message in enumerate(body.messages):
        messages += _messages(number, message)
    choice = body.tool_choice
    named: Any = None
    if choice is not None:
        named = {"auto": "auto", "any": "required", "none": "none", "tool": None}[choice.type]
        if choice.type == "tool":
            if choice.name is None:
                raise refused("tool_choice", "tool_choice of type tool needs a name.")
            named = {"type": "function", "function": {"name": choice.name}}
    given = {
        "model": body.model,
        "messages": messages,
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": named,
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
    }
    return chat.submit(served, adapter, ChatBody.model_validate(given))


async def answer(made: Chat) -> dict[str, Any]:
    """Wait for the answer and return the object ``message``."""
    whole = Delta()
    async for _, step in merged(made.requests):
        delta = made.parts[0].push(step)
        whole.reasoning += delta.reasoning
        whole.content += delta.content
        whole.calls += delta.calls
    blocks: list[dict[str, Any]] = []
    if whole.reasoning:
        blocks.append({"type": "thinking", "thinking": whole.reasoning, "signature": ""})
    if whole.content.strip() or not whole.calls:
        blocks.append({"type": "text", "text": whole.content})
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": _value(call.arguments)}
        for call in chat.kept_calls(made.body, whole.calls)
    ]
    return {**_head(made), "content": blocks, **_ending(made, bool(whole.calls)), "usage": _usage(made)}


async def events(made: Chat) -> AsyncIterator[bytes]:
    """Yield the answer as Anthropic's server-sent events."""
    start = {**_head(made), "content": [], "stop_reason": None, "stop_sequence": None}
    usage = {"input_tokens": len(made.requests[0].ids), "output_tokens": 0}
    yield _event("message_start", message={**start, "usage": usage})
    index, kind = -1, ""
    calls = False
    async for _, step in merged(made.requests):
        delta = made.parts[0].push(step)
        for name, key, text in (("thinking", "thinking", delta.reasoning), ("text", "text", delta.content)):
            if not text:
                continue
            if kind != name:
                if kind:
                    yield _event("content_block_stop", index=index)
                index, kind = index + 1, name
                block: dict[str, Any] = {"type": name, key: ""}
                if name == "thinking":
                    block["signature"] = ""
                yield _event("content_block_start", index=index, content_block=block)
            yield _event("content_block_delta", index=index, delta={"type": f"{name}_delta", key: text})
        for call in chat.kept_calls(made.body, delta.calls):
            if kind:
                yield _event("content_block_stop", index=index)
            index, kind, calls = index + 1, "tool_use", True
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            yield _event("content_block_start", index=index, content_block=block)
            part = {"type": "input_json_delta", "partial_json": call.arguments}
            yield _event("content_block_delta", index=index, delta=part)
    if kind:
        yield _event("content_block_stop", index=index)
    yield _event("message_delta", delta=_ending(made, calls), usage=_usage(made))
    yield _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return data({"type": kind, **fields}, kind)


def _head(made: Chat) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": made.name,
    }


def _ending(made: Chat, calls: bool) -> dict[str, Any]:
    request = made.requests[0]
    reason = request.finish_reason or "stop"
    stop = request.stream.stop_text
    named = "tool_use" if calls and reason != "length" else "stop_sequence" if stop else _REASONS[reason]
    return {"stop_reason": named, "stop_sequence": stop}


def _usage(made: Chat) -> dict[str, Any]:
    request = made.requests[0]
    return {
        "input_tokens": len(request.ids) - request.cached_tokens,
        "cache_read_input_tokens": request.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": request.timings.new_tokens,
    }


def _tool(tool: MessageTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None},
    }


def _value(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _text(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise refused(name, f"{name} must be a text, or parts of type text.")
        texts.append(part["text"])
    return "".join(texts)


def _messages(number: int, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one of Anthropic's messages as those of chat completions: results of tools are messages there."""
    where = f"messages.{number}"
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise refused(where, f"role must be user or assistant, found {role!r}.")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise refused(where, "content must be a text or a list of blocks.")
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    reasoning = ""
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            parts.append({"type": "text", "text": _text(where, [block])})
        elif kind == "thinking":
            reasoning += str(block.get("thinking", ""))
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image(where, block.get("source"))}})
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            result = _text(where, block.get("content") or "")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        else:
            raise refused(where, f"there are no blocks of type {kind!r} here.")
    made: dict[str, Any] = {"role": role, "content": parts}
    if all(part["type"] == "text" for part in parts):
        made["content"] = "".join(part["text"] for part in parts)
    if reasoning:
        made["reasoning_content"] = reasoning
    if calls:
        made["tool_calls"] = calls
    return [*results, *([made] if parts or calls else [])]


def _image(where: str, source: Any) -> str:
    if isinstance(source, dict) and source.get("type") == "base64":
        return f"data:{source.get('media_type')};base64,{source.get('data')}"
    if isinstance(source, dict) and source.get("type") == "url":
        return str(source.get("url"))
    raise refused(where, "an image needs a source of type base64 or url.")
