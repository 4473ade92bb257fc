"""``ortlm chat``: talk with a model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm.cli.generate import add_machine, add_settings, settings_of, summary
from ortlm.errors import BadOption, ContextFull, Error, nearest

if TYPE_CHECKING:
    from ortlm.runtime.generate import LanguageModel
    from ortlm.runtime.settings import Settings

_EXAMPLES = '''\
examples:
  ortlm chat phi --temp 0.7
  ortlm chat phi --system "Answer in one sentence."
  printf 'Hello\\nAnd in French?\\n' | ortlm chat phi

Lines between """ and """ are one message. Ctrl-C stops an answer, Ctrl-D leaves.
'''

_COMMANDS = {
    "/help": "show this list",
    "/system": "TEXT: set the system message and begin anew",
    "/clear": "begin anew",
    "/save": "FILE: write the conversation as JSON",
    "/load": "FILE: go on with a conversation that was saved",
    "/bye": "leave",
}


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model in the terminal, or answer the lines of stdin one after the other.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_settings(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "-v", "--verbose", action="store_true", help="write speeds to stderr after each answer"
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends."""
    settings = settings_of(args)
    from ortlm.runtime.generate import load

    lm = load(args.model, threads=args.threads, providers=args.provider)
    if lm.chat_template is None:
        raise BadOption(
            f"{args.model} has no chat template. Use `ortlm generate`, or put the publisher's "
            "chat_template.jinja into the folder."
        )
    talk = _Talk(lm, settings, system=args.system, verbose=args.verbose)
    _tell("/help lists commands, /bye or Ctrl-D leaves.")
    while (text := _read()) is not None:
        # A text of several lines is never a command: it may begin with a path.
        if text.startswith("/") and "\n" not in text:
            if not talk.command(text):
                break
        elif text.strip():
            talk.answer(text)
    return 0


class _Talk:
    """A conversation and what can be done with it."""

    def __init__(self, lm: LanguageModel, settings: Settings, *, system: str | None, verbose: bool) -> None:
        self._lm = lm
        self._settings = settings
        self._verbose = verbose
        self._system = system
        self.messages: list[dict[str, str]] = []
        self._clear()

    def answer(self, text: str) -> None:
        """Answer one message; a failure leaves the conversation as it was."""
        from ortlm.runtime.generate import Timings

        timings = Timings()
        pieces: list[str] = []
        self.messages.append({"role": "user", "content": text})
        try:
            for step in self._lm.stream(
                self.messages, settings=self._settings, reuse_cache=True, timings=timings
            ):
                pieces.append(step.text)
                sys.stdout.write(step.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            _tell("\n(stopped)")
        except Error as error:
            self.messages.pop()
            hint = " /clear begins anew." if isinstance(error, ContextFull) else ""
            _tell(f"error: {error}{hint}")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if self._verbose:
            _tell(summary(timings))

    def command(self, line: str) -> bool:
        """Obey a line such as "/save talk.json"; return whether to go on."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word in ("/bye", "/exit", "/quit"):
            return False
        if word == "/help":
            _tell("\n".join(f"  {name:9}{what}" for name, what in _COMMANDS.items()))
        elif word == "/clear":
            self._clear()
        elif word == "/system":
            self._system = rest or None
            self._clear()
        elif word in ("/save", "/load") and not rest:
            _tell(f"error: {word} needs a file name.")
        elif word == "/save":
            self._save(Path(rest))
        elif word == "/load":
            self._load(Path(rest))
        else:
            _tell(f"error: there is no command {word}; /help lists them." + nearest(word, _COMMANDS))
        return True

    def _clear(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def _save(self, path: Path) -> None:
        try:
            path.write_text(json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            _tell(f"error: {error}")

    def _load(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self.messages = [{"role": str(m["role"]), "content": str(m["content"] or "")} for m in found]
            # /clear goes back to the system message of this conversation.
            self._system = next((m["content"] for m in self.messages if m["role"] == "system"), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _tell(f"error: {path} holds no conversation: {error!r}")


def _read() -> str | None:
    """Return the next message, None at the end of the input."""
    try:
        line = _line(">>> ")
        if line is None or not line.startswith('"""'):
            return line
        lines = [line[3:]]
        while not lines[-1].endswith('"""'):
            more = _line("... ")
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines).removesuffix('"""').strip("\n")
    except KeyboardInterrupt:
        _tell("\n(Ctrl-D leaves)")
        return ""


def _line(prompt: str) -> str | None:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and editing
    try:
        return input(prompt)
    except EOFError:
        return None


def _tell(text: str) -> None:
    """Write what is not an answer."""
    print(text, file=sys.stderr)
