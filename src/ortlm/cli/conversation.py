"""A conversation with a model, and the commands that change it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm._utils.checked_json import loads
from ortlm._utils.formatting import system_error
from ortlm._utils.whole_files import write_whole
from ortlm.cli.interrupt import stoppable
from ortlm.cli.output import tell, write_generated
from ortlm.cli.prompts import Content, content_of
from ortlm.cli.report import summary
from ortlm.cli.settings import read_limited
from ortlm.errors import BadOption, ContextFull, Error, nearest

if TYPE_CHECKING:
    from ortlm.runtime.generation.stream import Timings
    from ortlm.runtime.language_model import LanguageModel
    from ortlm.runtime.sampling.settings import Settings

Messages = list[dict[str, Any]]

_COMMANDS = {
    "/help": "show this list",
    "/system": "TEXT: set the system message and start over; alone, remove it",
    "/clear": "start over",
    "/image": "FILE or URL: attach an image to the next message; alone, detach all",
    "/regen": "answer the last message again",
    "/undo": "take back the last message and its answer",
    "/set": "NAME VALUE: change a setting, such as temperature 0.7 or seed none; alone, show all",
    "/stats": "show speed and tokens of the last answer",
    "/save": "FILE: write the conversation as JSON",
    "/load": "FILE: resume a conversation that /save wrote",
    "/bye": "leave",
}
_LEAVE = ("/bye", "/exit", "/quit")
# What is no number, truth value or text, and what has no meaning for a single answer.
_FIXED = (
    "guidance",
    "processors",
    "logit_bias",
    "sequence_bias",
    "num_return_sequences",
    "logprobs",
    "prompt_logprobs",
)


class Talk:
    """A conversation and what can be done with it; ``messages`` are what was said."""

    def __init__(
        self,
        lm: LanguageModel,
        settings: Settings,
        *,
        system: str | None,
        verbose: bool,
        num_crops: int | None = None,
    ) -> None:
        self._lm = lm
        self._num_crops = num_crops
        self._waiting: list[str] = []
        self._settings = settings
        self._verbose = verbose
        self._system = system
        self._timings: Timings | None = None
        self.messages: Messages = []
        self._clear("")
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: tell("\n".join(f"  {name:9}{what}" for name, what in _COMMANDS.items())),
            "/system": self._begin_with,
            "/clear": self._clear,
            "/image": self._show,
            "/regen": self._regenerate,
            "/undo": self._undo,
            "/set": self._set,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
        }

    def take(self, text: str) -> bool:
        """Obey a command such as "/save talk.json" or answer a message; return whether to continue."""
        # A text of several lines is never a command: it may begin with a path.
        if not text.startswith("/") or "\n" in text:
            if text.strip() and self.answer(content_of(text, self._waiting)):
                self._waiting = []
            return True
        word, _, rest = text.strip().partition(" ")
        if word in _LEAVE:
            return False
        try:
            if word not in self._commands:
                raise BadOption(
                    f"there is no command {word}; /help lists them." + nearest(word, [*_COMMANDS, *_LEAVE])
                )
            self._commands[word](rest.strip())
        except Error as error:
            tell(f"error: {error}")
        except OSError as error:
            tell(f"error: {system_error(error)}")
        return True

    def answer(self, content: Content) -> bool:
        """Answer one message; return False for a failure, which leaves the conversation as it was."""
        asked = [*self.messages, {"role": "user", "content": content}]
        pieces: list[str] = []
        try:
            stream = self._lm.stream(asked, num_crops=self._num_crops, settings=self._settings)

            def write() -> str:
                reason = ""
                for step in stream:
                    pieces.append(step.text)
                    write_generated(step.text)
                    reason = step.finish_reason or reason
                return reason

            reason = stoppable(write, stream.cancel)
        except Error as error:
            if pieces:
                _end_line()
            hint = (
                " /undo takes the last exchange back, /clear starts over."
                if isinstance(error, ContextFull)
                else ""
            )
            tell(f"error: {error}{hint}")
            return False
        if reason is None and not any(pieces):
            tell("(stopped before the answer began; the conversation is as it was)")
            return False
        _end_line()
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        self._timings = stream.timings
        self._close(reason)
        return True

    def _close(self, reason: str | None) -> None:
        """Tell how the answer ended, as far as somebody wants to know."""
        assert self._timings is not None
        on_terminal = sys.stdin.isatty() and sys.stderr.isatty()
        if reason is None:
            tell("(stopped)")
        elif reason == "length" and (on_terminal or self._verbose):
            tell("(cut off at the token limit)", dim=True)
        if self._verbose:
            tell(summary(self._timings))
        elif on_terminal:
            tell(f"({self._timings.tokens_per_second:.1f} tokens/s)", dim=True)

    # --- commands ---------------------------------------------------------------------------------------

    def _clear(self, rest: str) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def _show(self, rest: str) -> None:
        if self._lm.vision_encoder is None:
            raise BadOption("this is a text model: it takes no images.")
        if not rest:
            self._waiting = []
            return
        # Told now rather than with the message, and seen before it is asked for.
        source = rest if rest.startswith(("http:", "https:", "data:")) else str(Path(rest).expanduser())
        self._lm.vision_encoder.read(source, self._num_crops)
        self._waiting.append(source)
        count = len(self._waiting)
        tell(f"({count} {'image' if count == 1 else 'images'} attached to the next message)")

    def _begin_with(self, rest: str) -> None:
        self._system = rest or None
        self._clear("")

    def _undo(self, rest: str) -> None:
        self._last()
        self.messages = self._before_last()

    def _regenerate(self, rest: str) -> None:
        content, before = self._last(), self.messages
        settings = self._settings
        if not settings.samples or settings.seed is not None:
            why = "seed is set" if settings.samples else "decoding is greedy; try /set temperature 0.8"
            tell(f"(the answer will be the same: {why})")
        self.messages = self._before_last()
        if not self.answer(content):
            self.messages = before

    def _last(self) -> Content:
        """Return the last message of the user. Raises BadOption if there is none."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                content: Content = message["content"]
                return content
        raise BadOption("there is no message yet.")

    def _before_last(self) -> Messages:
        at = max(at for at, message in enumerate(self.messages) if message["role"] == "user")
        return self.messages[:at]

    def _stats(self, rest: str) -> None:
        if self._timings is None:
            raise BadOption("there is no answer yet.")
        used = self._timings.prompt_tokens + self._timings.new_tokens
        tell(f"{summary(self._timings)}; context: {used:,} of {self._lm.manifest.context_tokens:,} tokens")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        defaults = _defaults()
        if not name:
            for entry, default in defaults.items():
                now = getattr(self._settings, entry)
                tell(f"  {entry} {_shown(now)}" + ("" if now == default else "  (changed)"))
            return
        if name not in defaults:
            why = "is given by a flag, if at all" if name in _FIXED else "is no setting"
            raise BadOption(f"{name} {why}; /set shows what can be set." + nearest(name, defaults))
        if value.strip():
            wanted = self._settings.of(self._settings, {name: _value(name, value.strip(), defaults[name])})
            # Tells what only the model can know, such as the name of an adapter.
            self._lm.generator(wanted)
            self._settings = wanted
        tell(f"  {name} {_shown(getattr(self._settings, name))}")

    def _save(self, rest: str) -> None:
        path = _path("/save", rest)
        if path.exists():
            # Only a conversation is ever replaced.
            _conversation(path)
        text = json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n"
        write_whole({path: text.encode()})

    def _load(self, rest: str) -> None:
        path = _path("/load", rest)
        self.messages = _conversation(path)
        # /clear rewinds to the system message of this conversation.
        self._system = next((m["content"] for m in self.messages if m["role"] == "system"), None)
        tell(f"({len(self.messages)} messages)")


def _end_line() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()


def _defaults() -> dict[str, object]:
    """Return what /set may change, with the values of a program that was told nothing."""
    from ortlm.runtime.sampling.settings import Settings

    return {
        entry.name: getattr(Settings(), entry.name) for entry in fields(Settings) if entry.name not in _FIXED
    }


def _value(name: str, text: str, default: object) -> object:
    """Return what ``text`` means for a setting: a number, a truth value or a text; ``default`` for none."""
    if text.lower() in ("none", "default"):
        return default
    if name == "adapter":
        return text
    value: object = text
    # A stop text may well be a number.
    if name not in ("stop", "bad_words") or text.startswith("["):
        try:
            value = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            value = text
    lists = ("stop", "bad_words", "stop_token_ids", "suppress_tokens", "begin_suppress_tokens")
    if name in lists and not isinstance(value, list):
        return [value]
    return value


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    artifact = getattr(value, "artifact", None)
    return str(value) if artifact is None else str(artifact.path)


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise BadOption(f"{command} needs a file name.")
    return Path(rest).expanduser()


def _content(content: object) -> Content:
    """Return a message's content: a text, or a list of parts that are texts and images."""
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        return content
    return str(content or "")


def _conversation(path: Path) -> Messages:
    """Return the conversation in ``path``. Raises BadOption if it holds none."""
    try:
        saved = loads(read_limited(path))
        messages = [{"role": str(m["role"]), "content": _content(m["content"])} for m in saved]
    except (ValueError, KeyError, TypeError) as error:
        raise BadOption(f"{path} holds no conversation that /save wrote.") from error
    if not isinstance(saved, list):
        raise BadOption(f"{path} holds no conversation that /save wrote.")
    return messages
