"""Calls of tools: how a model writes them, and how they are found in its answer.

Which form a model uses follows from its chat template, which shows it to the model.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.runtime.text.chat_template import ChatTemplate
from ortlm.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form: ``begin``, then JSON, then ``end``.

    ``several``: the JSON is a list of calls; otherwise one call, and each further one has a beginning of its own.
    ``arguments`` is the key of a call's arguments. ``special``: ``begin`` and ``end`` are special tokens.
    Without ``begin`` an answer that is JSON is a call.
    """

    begin: str
    end: str
    several: bool = False
    arguments: str = "arguments"
    special: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the function ``name``; ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str


def tool_format(template: ChatTemplate, tokenizer: Tokenizer) -> ToolFormat | None:
    """Return how a model with this ``template`` writes calls, None if the template reads no tools."""
    source = "\n".join(template.templates.values())
    if not any("tools" in template.facts(name).names for name in template.templates):
        return None
    # From the most special to the least: Hermes, Qwen and SmolLM; Mistral; Phi-4-mini and Granite; Llama 3.
    for begin, end, several in (
        ("<tool_call>", "</tool_call>", False),
        ("[TOOL_CALLS]", "", True),
        ("<|tool_call|>", "<|/tool_call|>" if "<|/tool_call|>" in source else "", True),
    ):
        if begin in source:
            token = tokenizer.token_id(begin)
            special = token is not None and token in tokenizer.special_ids
            return ToolFormat(begin, end, several, special=special)
    if '"parameters":' in source or '\\"parameters\\":' in source:
        return ToolFormat("", "", arguments="parameters")
    return ToolFormat("", "")


def forced(format_: ToolFormat, tools: Sequence[dict[str, Any]], *, parallel: bool) -> Guidance:
    """Return what makes an answer a call of one of ``tools``, by their names and parameters."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                format_.arguments: tool.get("parameters") or {"type": "object"},
            },
            "required": ["name", format_.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"anyOf": calls} if len(calls) > 1 else calls[0]
    if format_.several:
        schema = {"type": "array", "items": schema, "minItems": 1, **({} if parallel else {"maxItems": 1})}
    schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    if not format_.begin:
        return Guidance.json_schema(schema)

    def written(mark: str, space: str) -> str:
        if not mark:
            return ""
        if not format_.special:
            return json.dumps(space + mark if mark == format_.end else mark + space)
        return mark if mark.startswith("<") else f"{json.dumps(mark)}"

    space = "" if format_.several else "\n"
    call = f"{written(format_.begin, space)} json {written(format_.end, space)}".strip()
    more = f' ("\\n" {call})*' if parallel and not format_.several else ""
    return Guidance.lark(f"start: {call}{more}\njson: %json {json.dumps(schema)}\n")


def find(format_: ToolFormat, text: str) -> tuple[str, list[Call], str] | None:
    """Return the text before the calls in an answer's ``text``, the calls, and what follows; None without calls.

    Special tokens must be in ``text``.
    """
    before, begin, rest = text.partition(format_.begin) if format_.begin else ("", "", text)
    if format_.begin and not begin:
        return None
    found: list[Call] = []
    decoder = json.JSONDecoder()
    while True:
        rest = whole = rest.lstrip()
        if rest.startswith(format_.begin) and format_.begin:
            rest = rest[len(format_.begin) :].lstrip()
        if format_.several and rest and rest[0] not in "[{":
            # Newer Mistral models: the name, then the arguments.
            name, _, rest = rest.partition("[ARGS]" if "[ARGS]" in rest else "{")
            rest = rest if "[ARGS]" in text else "{" + rest
            calls: Any = {"name": name.strip()}
            try:
                calls[format_.arguments], at = decoder.raw_decode(rest.lstrip())
            except ValueError:
                return None
        else:
            try:
                calls, at = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                # An answer that was cut within a further call.
                rest = whole
                break
        rest = rest.lstrip()[at:].lstrip()
        for call in calls if isinstance(calls, list) else [calls]:
            made = _call(format_, call)
            if made is None:
                return None
            found.append(made)
        if format_.end and rest.startswith(format_.end):
            rest = rest[len(format_.end) :].lstrip()
        rest = rest.lstrip(";, \n")
        if not rest.startswith(format_.begin or "{"):
            break
    return (before.strip(), found, rest) if found else None


def may_begin(format_: ToolFormat, text: str) -> int | None:
    """Return where in ``text`` calls may begin; None if they cannot, however the text continues."""
    if not format_.begin:
        stripped = text.lstrip()
        return 0 if not stripped or stripped.startswith(("{", "[")) else None
    at = text.find(format_.begin)
    if at >= 0:
        return at
    for size in range(min(len(text), len(format_.begin) - 1), 0, -1):
        if text.endswith(format_.begin[:size]):
            return len(text) - size
    return None


def _call(format_: ToolFormat, call: Any) -> Call | None:
    if not isinstance(call, dict):
        return None
    call = call.get("function") if isinstance(call.get("function"), dict) else call
    name = call.get("name")
    arguments = call.get(format_.arguments, call.get("arguments", call.get("parameters", {})))
    if not isinstance(name, str):
        return None
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(f"call_{secrets.token_hex(12)}", name, text)
