"""Messages as chat templates want them: plain values, reasoning under the name that is read, parts or one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.errors import BadOption
from ortlm.runtime.text.template_budget import MOST_DEPTH, TemplateLimit
from ortlm.runtime.text.template_facts import TemplateFacts

# Under these names programs and servers give a message's reasoning, the usual ones first. transformers gives every
# template the first two.
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
    "thinking_content",
    "reasoning_text",
    "thought",
    "thoughts",
    "reasoning_details",
    "thinking_blocks",
)
_ALWAYS = ("reasoning_content", "thinking")
_REASONING_PARTS = ("thinking", "reasoning")
# Other names of the part {"type": "text", "text": ...}, by where their text stands.
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


class Parts(list[Any]):
    """The parts of a content that are all text. A template that wants a text after all gets one, joined."""

    def __str__(self) -> str:
        return joined(self)


def joined(parts: Sequence[Any]) -> str:
    """Return the text of ``parts``, with nothing between: clients cut texts wherever they like."""
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def prepared(message: Any, number: int, facts: TemplateFacts, *, parts: bool = True) -> dict[str, Any]:
    """Return ``message``, the ``number``-th, as a template with ``facts`` takes it.

    A content of text parts stays a list only if the template looks at parts, and ``parts`` is true. Raises
    BadOption for what is no message, or has parts that the template cannot take.
    """
    given = plain(message)
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise BadOption(
            f"message {number} must be a mapping such as "
            f'{{"role": "user", "content": "Hello"}}, found {shown(given)}.'
        )
    kept = {key: value for key, value in given.items() if value is not None}
    reasoning = _reasoning(kept)
    if isinstance(kept.get("content"), list):
        content, inside = _split(kept["content"], facts)
        kept["content"] = _content(content, number, facts, parts)
        reasoning = reasoning if reasoning is not None else inside
    if reasoning is not None:
        for name in _ALWAYS:
            kept.setdefault(name, reasoning)
        for name in facts.names.intersection(_REASONING):
            kept.setdefault(name, reasoning)
    return kept


def loses_reasoning(messages: Sequence[Mapping[str, Any]], facts: TemplateFacts) -> bool:
    """Return whether one of the prepared ``messages`` has reasoning that a template with ``facts`` never reads."""
    return not facts.names.intersection(_REASONING) and any(_ALWAYS[0] in message for message in messages)


def _reasoning(message: Mapping[str, Any]) -> str | None:
    for name in _REASONING:
        value = message.get(name)
        text = _part_text(value) if isinstance(value, list) else value
        if isinstance(text, str):
            return text
    return None


def _part_text(value: Any) -> str | None:
    """Return the text of a part of reasoning, or of a list of such; None if it has none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [_part_text(item) for item in value]
        shown_texts = [text for text in texts if text is not None]
        return "".join(shown_texts) if shown_texts else None
    if isinstance(value, Mapping):
        for name in ("text", *_REASONING_PARTS, "content", "summary"):
            text = _part_text(value.get(name))
            if text is not None:
                return text
    return None


def _split(content: list[Any], facts: TemplateFacts) -> tuple[list[Any], str | None]:
    """Return the parts of ``content`` that the template takes as such, and the reasoning that was among them."""
    kept, reasoning = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _REASONING_PARTS and not (facts.iterates_content and kind in facts.kinds):
            text = _part_text(part)
            if text is not None:
                reasoning.append(text)
                continue
        if kind in _TEXT_PARTS and kind not in facts.kinds and isinstance(part.get(_TEXT_PARTS[kind]), str):
            part = {"type": "text", "text": part[_TEXT_PARTS[kind]]}
        kept.append(part)
    return kept, "".join(reasoning) if reasoning else None


def _content(content: list[Any], number: int, facts: TemplateFacts, parts: bool) -> Any:
    other = next((part for part in content if not _is_text(part)), None)
    if other is None:
        return Parts(content) if facts.iterates_content and parts else joined(content)
    if not facts.iterates_content:
        kind = other.get("type") if isinstance(other, Mapping) else other
        raise BadOption(
            f"message {number} has a content part of the type {shown(kind)}, but the model's chat template takes "
            'texts only. Give {"type": "text", "text": ...}, or one text as "content".'
        )
    return content


def _is_text(part: object) -> bool:
    if isinstance(part, str):
        return True
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def plain(value: Any, level: int = 0) -> Any:
    """Return ``value`` rebuilt of nothing but what JSON has, so that a template reaches no methods of ours.

    Whatever JSON has no word for (images, arrays) becomes a text with the name of its type.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if level > MOST_DEPTH:
        raise TemplateLimit(f"the messages, tools or documents are nested deeper than {MOST_DEPTH}")
    if isinstance(value, Mapping):
        return {plain(key, level + 1): plain(item, level + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, level + 1) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item, level + 1) for item in value)
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return plain(dump(), level + 1)
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        return {name: plain(getattr(value, name), level + 1) for name in fields}
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        return plain(item(), level + 1)
    return f"<{type(value).__name__}>"
