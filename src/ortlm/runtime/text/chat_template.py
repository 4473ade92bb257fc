"""Chat templates: from messages to the prompt that a model was trained on.

Templates are the publisher's code, so they run in jinja2's sandbox, with limits.
Source of the semantics: transformers' chat_template_utils.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ortlm._utils.checked_json import shown
from ortlm._utils.formatting import printable
from ortlm.artifact import read_templates
from ortlm.errors import BadArtifact, BadOption, nearest
from ortlm.runtime.text.messages import Parts, loses_reasoning, plain, prepared
from ortlm.runtime.text.template_budget import SECONDS, TemplateLimit
from ortlm.runtime.text.template_facts import TemplateFacts, template_facts
from ortlm.runtime.text.template_sandbox import ChatEnvironment, render
from ortlm.runtime.text.types import Message

__all__ = ["ChatTemplate", "Message"]

_log = logging.getLogger(__name__)
_MOST_MESSAGE = 500
# Marks the place where a message that is to be continued ends; a space after it shows whether the template trims.
_END_MARK = "ortlm:end:of:the:message"


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: jinja2.Template
    facts: TemplateFacts


class ChatTemplate:
    """The chat template of one artifact, or several under names.

    ``variables`` are the special tokens by name: templates write ``{{ bos_token }}``. ``seconds`` is how long one
    rendering may take; a template also has limits of steps, output and memory, which nothing real reaches.
    """

    def __init__(
        self, templates: Mapping[str, str], variables: Mapping[str, str], *, seconds: float = SECONDS
    ) -> None:
        self.templates = dict(templates)
        self.seconds = seconds
        self._variables = dict(variables)
        self._compiled: dict[str, _Compiled] = {}
        self._told = False

    @classmethod
    def open(cls, folder: Path, variables: Mapping[str, str]) -> ChatTemplate | None:
        """Open the templates in ``folder``, or return None if there are none. Raises BadArtifact."""
        templates = read_templates(folder)
        return cls(templates, variables) if templates else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt of ``messages``, each with "role" and "content".

        Encode it without adding special tokens: a template writes them itself. ``tools`` are JSON schemas;
        ``name`` picks one of several templates, otherwise "tool_use" is taken with tools if there is one;
        ``variables`` are further names that the template may use. With ``continue_final_message`` the prompt ends
        with the last message's text, so that a model continues writing it.

        An assistant's reasoning may come as "reasoning_content", "reasoning" or "thinking", or as a part of the
        content; it reaches the template under the name that it reads. Raises BadOption if the template refuses the
        messages, BadArtifact if it is damaged or asks for more than it may have.
        """
        compiled = self._template(
            name or ("tool_use" if tools is not None and "tool_use" in self.templates else "default")
        )
        if continue_final_message and add_generation_prompt:
            raise BadOption(
                "continue_final_message continues the last message, add_generation_prompt begins a new one; "
                "set one of them to false."
            )
        try:
            names = plain({**self._variables, **(variables or {})}) | {
                "tools": plain(list(tools)) if tools is not None else None,
                "documents": plain(list(documents)) if documents is not None else None,
                "add_generation_prompt": add_generation_prompt,
            }
            checked = self._prepare(messages, compiled, parts=True)
            lists = any(isinstance(message.get("content"), Parts) for message in checked)
            try:
                return self._render(compiled, checked, names, continue_final_message)
            except (BadOption, TemplateLimit):
                raise
            except Exception:
                # It looks at the parts of some roles only: of others it wants a text.
                if not lists:
                    raise
                whole = self._prepare(messages, compiled, parts=False)
                return self._render(compiled, whole, names, continue_final_message)
        except TemplateLimit as error:
            raise BadArtifact(
                f"the model's chat template was stopped: {error}. It is damaged or made to do harm; use the "
                "publisher's, or give the prompt as one text."
            ) from error
        except (BadOption, BadArtifact):
            raise
        # A template is a program of somebody else's: it may fail in any way that Python knows.
        except Exception as error:
            raise BadOption(f"the model's chat template refused the messages: {_said(error)}") from error

    def _prepare(
        self, messages: Sequence[Message], compiled: _Compiled, *, parts: bool
    ) -> list[dict[str, Any]]:
        checked = [
            prepared(message, number, compiled.facts, parts=parts) for number, message in enumerate(messages)
        ]
        if not self._told and loses_reasoning(checked, compiled.facts):
            self._told = True
            _log.warning(
                "the messages hold reasoning, which the model's chat template does not read: it is left out."
            )
        return checked

    def _render(
        self, compiled: _Compiled, messages: list[dict[str, Any]], names: dict[str, Any], continued: bool
    ) -> str:
        if not continued:
            return render(compiled.template, names | {"messages": messages}, self.seconds)
        text = _marked(messages)
        rendered = render(compiled.template, names | {"messages": messages}, self.seconds)
        if _END_MARK not in rendered or text.strip() not in rendered:
            raise BadOption(
                "the last message cannot be continued: the model's chat template leaves out or changes its text."
            )
        end = rendered.rindex(_END_MARK)
        # Without the space after it the template trims, so the text itself has to be trimmed too.
        trimmed = not rendered.startswith(f"{_END_MARK} ", end)
        return rendered[:end].rstrip() if trimmed else rendered[:end]

    def facts(self, name: str = "default") -> TemplateFacts:
        """Return what the template ``name`` reads of messages. Raises BadArtifact if it is damaged."""
        return self._template(name).facts

    def _template(self, name: str) -> _Compiled:
        if name not in self.templates:
            if len(self.templates) > 1 or name != "default":
                raise BadOption(
                    f"there is no chat template {shown(name)}; there is {', '.join(self.templates)}."
                    + nearest(name, self.templates)
                )
            name = next(iter(self.templates))
        if name not in self._compiled:
            self._compiled[name] = _compile(name, self.templates[name])
        return self._compiled[name]


def _compile(name: str, source: str) -> _Compiled:
    environment = _environment()
    try:
        facts = template_facts(environment.parse(source))
        return _Compiled(environment.from_string(source), facts)
    except TemplateLimit as error:
        raise BadArtifact(f"the chat template {shown(name)} is refused: {error}.") from error
    except (jinja2.TemplateSyntaxError, SyntaxError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise BadArtifact(f"the chat template {shown(name)} is damaged{line}: {_said(error)}") from error
    # Whatever jinja2 and Python's compiler do about a program that is too deep or too large.
    except Exception as error:
        raise BadArtifact(
            f"the chat template {shown(name)} is damaged or too complicated: {_said(error)}"
        ) from error


@cache
def _environment() -> ChatEnvironment:
    return ChatEnvironment()


def _marked(messages: list[dict[str, Any]]) -> str:
    """Put the mark at the end of the last message's text; return the text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text = part["text"]
                part["text"] = f"{text}{_END_MARK} "
                return str(text)
    if not isinstance(content, str):
        raise BadOption("continue_final_message needs a last message that has a text to continue.")
    messages[-1]["content"] = f"{content}{_END_MARK} "
    return content


def _said(error: Exception) -> str:
    # What a template says is a stranger's text: one line, without what terminals obey.
    text = " ".join(printable((str(error) or type(error).__name__)[: 2 * _MOST_MESSAGE]).split())
    return text if len(text) <= _MOST_MESSAGE else f"{text[:_MOST_MESSAGE]}..."
