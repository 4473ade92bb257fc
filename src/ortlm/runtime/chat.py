"""Chat templates: from messages to the prompt that a model was trained on.

Templates are the publisher's code, so they run in jinja2's sandbox.
Source of the semantics: transformers' chat_template_utils.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ortlm.errors import BadArtifact, BadOption, nearest
from ortlm.runtime.tokenizer import read_settings

Message = Mapping[str, Any]
# A template is a program of somebody else's: it may fail in any way that Python knows.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """The chat template of one artifact, or several under names.

    ``variables`` are the special tokens by name: templates write ``{{ bos_token }}``.
    """

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self._variables = dict(variables)
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def open(cls, folder: Path, variables: Mapping[str, str]) -> ChatTemplate | None:
        """Open the templates in ``folder``, or return None if there are none."""
        templates = _templates(folder)
        return cls(templates, variables) if templates else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt of ``messages``, each with "role" and "content".

        Encode it without adding special tokens: a template writes them itself. ``tools`` are JSON schemas;
        ``name`` picks one of several templates; ``variables`` are further names that the template may use.
        Raises BadOption if the template refuses the messages, BadArtifact if the template is damaged.
        """
        template = self._template(
            name or ("tool_use" if tools and "tool_use" in self.templates else "default")
        )
        checked = [_checked(message, number) for number, message in enumerate(messages)]
        try:
            return template.render(
                messages=checked,
                tools=list(tools) if tools is not None else None,
                documents=list(documents) if documents is not None else None,
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, **(variables or {})},
            )
        except _TEMPLATE_ERRORS as error:
            raise BadOption(f"the model's chat template refused the messages: {error}") from error

    def _template(self, name: str) -> jinja2.Template:
        if name not in self.templates:
            if len(self.templates) > 1 or name != "default":
                raise BadOption(
                    f"there is no chat template {name!r}; there is {', '.join(self.templates)}."
                    + nearest(name, self.templates)
                )
            name = next(iter(self.templates))
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self.templates[name])
            except jinja2.TemplateSyntaxError as error:
                raise BadArtifact(
                    f"the chat template {name!r} is damaged, line {error.lineno}: {error}"
                ) from error
        return self._compiled[name]


def _templates(folder: Path) -> dict[str, str]:
    """Return templates by name; a file of its own wins over what stands in a configuration."""
    found: dict[str, str] = {}
    for source in ("chat_template.json", "tokenizer_config.json"):
        settings = read_settings(folder / source)
        for value in (settings.get("named_chat_templates"), settings.get("chat_template")):
            if isinstance(value, str):
                found["default"] = value
            elif isinstance(value, list):
                found.update(_named(value))
    path = folder / "chat_template.jinja"
    if path.is_file():
        found["default"] = path.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def _named(templates: list[Any]) -> dict[str, str]:
    named = {t.get("name"): t.get("template") for t in templates if isinstance(t, Mapping)}
    return {n: t for n, t in named.items() if isinstance(n, str) and isinstance(t, str)}


def _checked(message: Message, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadOption(
            f"message {number} must be a mapping such as "
            f'{{"role": "user", "content": "Hello"}}, found {message!r}.'
        )
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        # Most templates join strings; a list of nothing but text says the same.
        kept["content"] = "".join(part["text"] for part in content)
    return kept


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 wants a class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which models have never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
