"""What ``/openapi.json`` says of answers; requests are described by their own models."""

from __future__ import annotations

from typing import Any

Responses = dict[int | str, dict[str, Any]]

_TEXT = {"type": "string"}
_PERHAPS = {"anyOf": [{"type": "string"}, {"type": "null"}]}
# As OpenAI's clients and as Anthropic's know them.
OPENAI_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": _TEXT, "type": _TEXT, "param": _PERHAPS, "code": _PERHAPS},
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
ANTHROPIC_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": _TEXT, "message": _TEXT},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}


def responses(
    *, streams: bool = False, media: str = "application/json", error: Any = OPENAI_ERROR
) -> Responses:
    """Return the answers of an endpoint: an object or, if it ``streams``, events; or an ``error``."""
    content: dict[str, Any] = {media: {"schema": {"type": "object"} if media.endswith("json") else _TEXT}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    return {
        200: {"description": "What was asked for.", "content": content},
        "default": {
            "description": "Why there is no answer.",
            "content": {"application/json": {"schema": error}},
        },
    }
