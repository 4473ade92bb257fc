"""``POST /v1/responses``: OpenAI's newer API, without anything stored, by way of chat completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ortlm.server import chat
from ortlm.server.answer import Delta
from ortlm.server.chat import Chat
from ortlm.server.errors import ApiError, refused
from ortlm.server.served import ServedModel
from ortlm.server.stream import data, merged
from ortlm.server.tools import Call
from ortlm.server.wire import Body, ChatBody, Shown


class ResponseTool(Shown):
    """A tool: of all kinds, functions are there."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(BaseModel):
    """The one function that is to be called."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    """What the text is to look like."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(Body):
    """``POST /v1/responses``."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | int | None = None
    top_p: float | int | None = None
    stream: bool | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None


@dataclass
class Response:
    """A request for a response, submitted: the ``chat`` that answers it, and what was asked."""

    chat: Chat
    body: ResponsesBody
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    events: int = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        """Return the next event of the stream."""
        self.events += 1
        return data({"type": kind, "sequence_number": self.events - 1, **fields}, kind)

    def object(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the object ``response`` with its ``output`` so far."""
        body, request = self.body, self.chat.requests[0]
        cut = status == "incomplete"
        usage = None
        if request.done:
            prompt, new = len(request.ids), request.timings.new_tokens
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": request.cached_tokens},
                "output_tokens": new,
                "output_tokens_details": {"reasoning_tokens": self.chat.parts[0].reasoning_tokens},
                "total_tokens": prompt + new,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.chat.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"} if body.text is None or body.text.format is None else
                     body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto" if body.tool_choice is None else
            body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage,
        }  # fmt: skip

    @property
    def status(self) -> str:
        """How it has ended."""
        return "incomplete" if self.chat.requests[0].finish_reason == "length" else "completed"


def submit(served: ServedModel, adapter: str | None, body: ResponsesBody) -> Response:
    """Submit what ``body`` asks for. Raises ApiError for what cannot be honored."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for number, item in enumerate(body.input):
            _add(messages, item, f"input.{number}")
    choice: Any = body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    form: dict[str, Any] | None = None
    wanted = body.text.format if body.text is not None else None
    if wanted is not None and wanted.type == "json_schema":
        if wanted.schema_ is None:
            raise refused("text", "text.format of type json_schema needs a schema.")
        form = {"type": "json_schema", "json_schema": {"name": wanted.name, "schema": wanted.schema_}}
    elif wanted is not None:
        if wanted.schema_ is not None:
            raise refused("text.format.schema", f"text.format of type {wanted.type} takes no schema.")
        form = {"type": wanted.type}
    given = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
        if body.tools
        else None,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": form,
    }
    return Response(chat.submit(served, adapter, ChatBody.model_validate(given)), body)


async def answer(made: Response) -> dict[str, Any]:
    """Wait for the answer and return the object ``response``."""
    whole = Delta()
    async for _, step in merged(made.chat.requests):
        delta = made.chat.parts[0].push(step)
        whole.reasoning += delta.reasoning
        whole.content += delta.content
        whole.calls += delta.calls
    output: list[dict[str, Any]] = []
    if whole.reasoning:
        output.append(_reasoning(_id("rs"), whole.reasoning))
    if whole.content.strip() or not whole.calls:
        output.append(_message(_id("msg"), whole.content, made.status))
    output += [_call(_id("fc"), call) for call in chat.kept_calls(made.chat.body, whole.calls)]
    return made.object(made.status, output)


async def events(made: Response) -> AsyncIterator[bytes]:
    """Yield the answer as typed server-sent events."""
    event = made.event
    output: list[dict[str, Any]] = []
    yield event("response.created", response=made.object("in_progress", []))
    yield event("response.in_progress", response=made.object("in_progress", []))
    item, text, reasoning = "", "", ""
    async for _, step in merged(made.chat.requests):
        delta = made.chat.parts[0].push(step)
        reasoning += delta.reasoning
        if delta.content and not item:
            if reasoning:
                for one in _whole(event, len(output), _reasoning(_id("rs"), reasoning)):
                    yield one
                output.append(_reasoning(_id("rs"), reasoning))
                reasoning = ""
            item = _id("msg")
            begun = {**_message(item, "", "in_progress"), "content": []}
            yield event("response.output_item.added", output_index=len(output), item=begun)
            where = {"item_id": item, "output_index": len(output), "content_index": 0}
            yield event("response.content_part.added", **where, part=_part(""))
        if delta.content:
            text += delta.content
            where = {"item_id": item, "output_index": len(output), "content_index": 0}
            yield event("response.output_text.delta", **where, delta=delta.content, logprobs=[])
        if step.finish_reason is None:
            continue
        if item:
            where = {"item_id": item, "output_index": len(output), "content_index": 0}
            message = _message(item, text, made.status)
            yield event("response.output_text.done", **where, text=text, logprobs=[])
            yield event("response.content_part.done", **where, part=_part(text))
            yield event("response.output_item.done", output_index=len(output), item=message)
            output.append(message)
        if reasoning:
            for one in _whole(event, len(output), _reasoning(_id("rs"), reasoning)):
                yield one
            output.append(_reasoning(_id("rs"), reasoning))
        for call in chat.kept_calls(made.chat.body, delta.calls):
            done = _call(_id("fc"), call)
            at = {"item_id": done["id"], "output_index": len(output)}
            begun = {**done, "arguments": "", "status": "in_progress"}
            yield event("response.output_item.added", output_index=len(output), item=begun)
            yield event("response.function_call_arguments.delta", **at, delta=call.arguments)
            yield event(
                "response.function_call_arguments.done", **at, name=call.name, arguments=call.arguments
            )
            yield event("response.output_item.done", output_index=len(output), item=done)
            output.append(done)
    yield event(f"response.{made.status}", response=made.object(made.status, output))


def failed(made: Response, error: ApiError) -> bytes:
    """Return ``error`` as the last event of the stream of ``made``."""
    code = {429: "rate_limit_exceeded"}.get(error.status, "server_error")
    found = {**made.object("failed", []), "error": {"code": code, "message": error.message}}
    return made.event("response.failed", response=found)


def _whole(event: Any, index: int, item: dict[str, Any]) -> list[bytes]:
    return [
        event("response.output_item.added", output_index=index, item=item),
        event("response.output_item.done", output_index=index, item=item),
    ]


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(number: str, text: str, status: str) -> dict[str, Any]:
    return {"id": number, "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}


def _reasoning(number: str, text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": number, "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def _call(number: str, call: Call) -> dict[str, Any]:
    return {
        "id": number, "type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments,
        "status": "completed",
    }  # fmt: skip


def _add(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Add an item of the input to the messages of a chat."""
    kind = item.get("type", "message")
    if kind == "message" and isinstance(item.get("role"), str):
        content = item.get("content")
        if isinstance(content, list):
            content = [_input_part(part, where) for part in content]
        messages.append({"role": item["role"], "content": content})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant" and last.get("tool_calls"):
            last["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        if not isinstance(item.get("output"), str):
            raise refused(where, "the output of a function call must be a text.")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item["output"]})
    elif kind != "reasoning":
        raise refused(where, f"there are no items of type {str(kind)[:64]!r} here.")


def _input_part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    raise refused(where, f"there are no content parts of type {str(kind)[:64]!r} here.")
