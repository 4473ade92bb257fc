"""The form of an answer: JSON of a schema, a regular expression, a grammar, or one of some texts.

    lm.generate(prompt, guidance=Guidance.regex("[0-9]{4}"))

Grammars are compiled by llguidance, which is imported when the first Guidance is made.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ortlm._utils.formatting import printable
from ortlm.errors import BadOption

Kind = Literal["json_schema", "regex", "lark", "choices"]

_T = TypeVar("_T")
# Unlimited whitespace is where a weak model gets lost for good: a new line is always likely after a new line.
_WHITESPACE = r"[ \t\r\n]{1,20}"
_WHITESPACE_KEYS = {"whitespace_flexible", "whitespace_pattern"}
# An attribute of a rule: stop takes back tokens that were taken, temperature is for who draws them.
_NOT_OBEYED = re.compile(
    r'^[ \t]*[\w-]+\[(?:[^\]"\n]|"(?:\\.|[^"\\\n])*")*?\b(stop|temperature)\s*=', re.MULTILINE
)
_LONGEST_GRAMMAR = 500_000
_COMPILER_STACK = 512 << 20

TITLES: dict[Kind, str] = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "lark": "the grammar",
    "choices": "the list of choices",
}


@dataclass(frozen=True, slots=True)
class Guidance:
    """The form of an answer; made by the methods below, which raise BadOption for what cannot be used.

    ``kind`` says which of them made it, ``text`` is what that was given, ``grammar`` what llguidance compiles.
    ``ignored`` tells what a schema asks for that will not be enforced, because the schema itself allows that
    with ``"x-guidance": {"lenient": true}`` or ``{"coerce_one_of": true}``; without these it is an error.
    """

    kind: Kind
    text: str
    grammar: str = field(repr=False)
    ignored: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if len(self.grammar) > _LONGEST_GRAMMAR:
            raise BadOption(
                f"{TITLES[self.kind]} has {len(self.grammar)} characters; at most {_LONGEST_GRAMMAR} are allowed."
            )
        from llguidance import LLMatcher

        wrong, messages = on_deep_stack(lambda: LLMatcher.validate_grammar_with_warnings(self.grammar))
        if wrong:
            raise refused(self.kind, "\n".join(messages))
        # What names tokens is checked against a vocabulary when a guide is made.
        messages = [message for message in messages if not message.startswith("no tokenizer")]
        if messages and '"x-guidance"' not in self.text:
            raise refused(self.kind, "\n".join(messages))
        object.__setattr__(self, "ignored", tuple(messages))

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Guidance:
        """Return what makes the answer JSON that follows ``schema``, as text or as a mapping.

        Properties come in the schema's order. At most 20 characters of whitespace stand between two tokens of
        JSON; ``"x-guidance": {"whitespace_flexible": false}`` in the schema allows none, and other keys there
        set other rules. Raises BadOption for what is no schema, and for keywords that cannot be enforced.
        """
        from llguidance import LLMatcher

        text = _text("json_schema", schema if isinstance(schema, str) else _dumped(schema))
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise refused("json_schema", f"it is no JSON: {error}") from error
        if not isinstance(parsed, (dict, bool)):
            raise refused("json_schema", f"a schema is an object, found {type(parsed).__name__}")
        own = parsed.get("x-guidance") if isinstance(parsed, dict) else None
        bounded = not (isinstance(own, dict) and _WHITESPACE_KEYS & own.keys())
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_pattern": _WHITESPACE} if bounded else None
            )
        except ValueError as error:
            raise refused("json_schema", str(error)) from error
        return cls("json_schema", text, grammar)

    @classmethod
    def json_object(cls) -> Guidance:
        """Return what makes the answer any JSON object."""
        return cls.json_schema('{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Guidance:
        """Return what makes the whole answer match ``pattern``, in the syntax of Rust's regex crate.

        There are no look-arounds and no back-references; ``.`` is any character but a line break.
        Raises BadOption for a pattern that cannot be used.
        """
        from llguidance import LLMatcher

        text = _text("regex", pattern)
        # The compiler drops a lone backslash at the end, where every other one calls it an error.
        if (len(text) - len(text.rstrip("\\"))) % 2:
            raise refused("regex", f"{text!r} ends with a backslash that escapes nothing")
        return cls("regex", text, LLMatcher.grammar_from_regex(text))

    @classmethod
    def lark(cls, grammar: str) -> Guidance:
        """Return what makes the answer follow ``grammar``, in llguidance's variant of Lark's syntax.

        The rule ``start`` is the answer. Special tokens are named as ``<|name|>`` or by id as ``<[7]>``.
        Raises BadOption for a grammar that cannot be used, attributes that cannot be obeyed included.
        """
        text = _text("lark", grammar)
        # The compiler would take it for its own description of several grammars.
        if text.lstrip().startswith("{"):
            raise refused("lark", "it begins with {; a grammar holds rules such as start: /[0-9]+/")
        if attribute := _NOT_OBEYED.search(text):
            raise refused(
                "lark", f"{attribute[0].strip()} … : this attribute cannot be obeyed; see suffix and lazy"
            )
        return cls("lark", text, text)

    @classmethod
    def choices(cls, options: Sequence[str]) -> Guidance:
        """Return what makes the answer one of the texts ``options``.

        Raises BadOption if it is no list of texts, or one of them is empty.
        """
        if isinstance(options, (str, bytes)) or not isinstance(options, Sequence) or not options:
            raise BadOption(f"choices must be a list of at least one text, found {options!r}.")
        texts = [_text("choices", option) for option in options]
        if "" in texts:
            raise BadOption("choices holds an empty text; every choice needs at least one character.")
        quoted = [json.dumps(text) for text in dict.fromkeys(texts)]
        return cls("choices", json.dumps(texts), f"start: CHOICE\nCHOICE: {' | '.join(quoted)}")


def refused(kind: Kind, reason: str) -> BadOption:
    """Return the error for what the compiler refused for ``reason``."""
    # The compiler points at a place with a caret in a line of its own.
    lines = [line.strip() for line in brief(reason).splitlines() if line.strip(" ^")]
    said = printable(" ".join(lines)).rstrip(".")
    return BadOption(f"{TITLES[kind]} cannot be used: {said}. Change or remove what is named there.")


def brief(message: str) -> str:
    """Return llguidance's message without what it tells of its inside, and at most 1000 characters of it."""
    message = re.split(r"\n<(?:state|backtrace)>", message, maxsplit=1)[0].strip()
    return message if len(message) <= 1000 else f"{message[:500]} … {message[-500:]}"


def _text(kind: Kind, value: object) -> str:
    if not isinstance(value, str):
        raise BadOption(f"{TITLES[kind]} must be text, found {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadOption(f"{TITLES[kind]} holds half a character that is no text: {error}") from error
    return value


def _dumped(schema: object) -> str:
    """Return a schema given as a mapping as text, with its order."""
    if not isinstance(schema, Mapping):
        raise BadOption(f"the JSON schema must be text or a mapping, found {type(schema).__name__}.")
    try:
        return json.dumps(schema, allow_nan=False, default=_as_dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise refused("json_schema", f"it cannot be written as JSON: {error}") from error


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_stack_size_lock = threading.Lock()


def on_deep_stack(work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns, run on a large stack.

    The compiler recurses over rules that refer to each other, and on a usual stack a chain of a thousand of
    them would end the process. Only what is used of the stack takes memory.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="ortlm-grammar")
    with _stack_size_lock:
        usual = threading.stack_size(_COMPILER_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return future.result()
