"""Calls of tools: how a model writes them, and how they are found in its answer.

Which form a model uses follows from its chat template, which shows it to the model.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.runtime.text.chat_template import ChatTemplate
from ortlm.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form: ``begin``, then JSON, then ``end``.

    ``several``: the JSON is a list of calls; otherwise one call, and each further one has a beginning of its own.
    ``arguments`` is the key of a call's arguments. ``special``: ``begin`` and ``end`` are special tokens, which
    are no text; ``begin_id`` and ``end_id`` are the tokens that they are, special or not.
    Without ``begin`` an answer that is JSON is a call. ``id_length``: the template takes ids of this length only.
    ``separator``: each call has a beginning of its own, and is a name, this, and the arguments.
    ``in_system``: the template takes tools as JSON in the field ``tools`` of the system message. ``written``: it
    writes the calls of earlier answers itself.
    """

    begin: str
    end: str
    several: bool = False
    arguments: str = "arguments"
    special: bool = False
    begin_id: int | None = None
    end_id: int | None = None
    id_length: int | None = None
    separator: str = ""
    separator_id: int | None = None
    in_system: bool = False
    written: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the function ``name``; ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str


# From the most special to the least: Hermes, Qwen and SmolLM; Mistral; Phi-4-mini and Granite.
_MARKS = (
    ToolFormat("<tool_call>", "</tool_call>"),
    # Its templates refuse other ids.
    ToolFormat("[TOOL_CALLS]", "", several=True, id_length=9),
    ToolFormat("<|tool_call|>", "<|/tool_call|>", several=True),
)


def tool_format(template: ChatTemplate, tokenizer: Tokenizer) -> ToolFormat | None:
    """Return how a model with this ``template`` writes calls, None if the template reads no tools."""
    source = "\n".join(template.templates.values())
    facts = [template.facts(name) for name in template.templates]
    names = frozenset[str]().union(*(one.names for one in facts))
    if "tools" not in names:
        return None
    in_system = not any("tools" in one.variables for one in facts)
    written = "tool_calls" in names
    # A template may leave it to the model, which knows the mark as a token.
    for known in (source.__contains__, lambda mark: tokenizer.token_id(mark) is not None):
        for form in _MARKS:
            if known(form.begin):
                end = form.end if not form.several or known(form.end) else ""
                begin_id = tokenizer.token_id(form.begin)
                # As newer Mistral models write it.
                separator = "[ARGS]" if form.begin == "[TOOL_CALLS]" and "[ARGS]" in source else ""
                return replace(
                    form,
                    end=end,
                    special=begin_id in tokenizer.special_ids,
                    begin_id=begin_id,
                    end_id=tokenizer.token_id(end) if end else None,
                    separator=separator,
                    separator_id=tokenizer.token_id(separator) if separator else None,
                    in_system=in_system,
                    written=written,
                )
    # Llama 3, and what shows no form at all.
    shows = '"parameters":' in source or '\\"parameters\\":' in source
    arguments = "parameters" if shows else "arguments"
    return ToolFormat("", "", arguments=arguments, in_system=in_system, written=written)


def forced(format_: ToolFormat, tools: Sequence[dict[str, Any]], *, parallel: bool) -> Guidance:
    """Return what makes an answer a call of one of ``tools``, by their names and parameters.

    Arguments that the parameters do not name are left out, unless they say ``additionalProperties``.
    """

    def mark(text: str, token: int | None, before: str = "", after: str = "") -> str:
        if token is None:
            return json.dumps(before + text + after) if text else ""
        # The grammar's own texts never consist of such tokens.
        around = [json.dumps(space) if space else "" for space in (before, after)]
        return f"{around[0]} <[{token}]> {around[1]}"

    space = "\n" if format_.begin and not format_.several else ""
    begin = mark(format_.begin, format_.begin_id, after=space)
    end = mark(format_.end, format_.end_id, before=space)
    rules = [f"call: {' | '.join(f'call_{at}' for at in range(len(tools)))}"]
    for at, tool in enumerate(tools):
        if format_.separator:
            separator = mark(format_.separator, format_.separator_id)
            rules.append(f"call_{at}: {json.dumps(tool['name'])} {separator} arguments_{at}")
        else:
            # Arguments have a schema of their own, within which their references lead.
            text = f'{{"name":{json.dumps(tool["name"])},{json.dumps(format_.arguments)}:'
            rules.append(f'call_{at}: {json.dumps(text)} arguments_{at} "}}"')
        schema = {**_parameters(tool), "x-guidance": {"whitespace_flexible": False}}
        rules.append(f"arguments_{at}: %json {json.dumps(schema)}")
    if format_.several and not format_.separator:
        more = '("," call)*' if parallel else ""
        start = f'{begin} "[" call {more} "]" {end}'
    else:
        one = f"{begin} call {end}"
        # Without a mark nothing tells where the next one begins.
        start = f"{one} ({json.dumps(space) if space else ''} {one})*" if parallel and format_.begin else one
    return Guidance.lark("\n".join([f"start: {start}", *rules, ""]))


# What may allow a property that an object does not name itself.
_OPEN = frozenset(
    {
        "additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref", "not",
        "if", "dependentSchemas",
    }
)  # fmt: skip
_INNER, _INNER_LISTS = ("properties", "$defs", "definitions"), ("anyOf", "oneOf", "prefixItems")


def _parameters(tool: dict[str, Any]) -> Any:
    parameters = tool.get("parameters") or {"type": "object"}
    # What is put together of several objects must leave each of them open.
    return parameters if '"allOf"' in json.dumps(parameters) else _closed(parameters)


def _closed(schema: Any) -> Any:
    """Return ``schema`` with objects that hold nothing but their properties, where it does not say otherwise."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in _INNER:
        if isinstance(made.get(key), dict):
            made[key] = {name: _closed(value) for name, value in made[key].items()}
    for key in _INNER_LISTS:
        if isinstance(made.get(key), list):
            made[key] = [_closed(value) for value in made[key]]
    if "items" in made:
        made["items"] = _closed(made["items"])
    if made.get("properties") and not _OPEN & made.keys():
        made["additionalProperties"] = False
    return made


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


def calls_text(format_: ToolFormat, calls: Sequence[dict[str, Any]]) -> str:
    """Return ``calls``, as messages hold them, in the form in which the model writes them."""
    each = [
        {"name": call["function"]["name"], format_.arguments: call["function"].get("arguments") or {}}
        for call in calls
    ]
    texts = [json.dumps(one, ensure_ascii=False) for one in ([each] if format_.several else each)]
    space = "" if format_.several or not format_.begin else "\n"
    return "\n".join(f"{format_.begin}{space}{text}{space}{format_.end}" for text in texts)


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
    number = secrets.token_hex(12)
    return Call(f"call_{number}" if format_.id_length is None else number[: format_.id_length], name, text)
