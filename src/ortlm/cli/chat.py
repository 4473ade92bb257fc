"""``ortlm chat``: chat with a model."""

from __future__ import annotations

import argparse
import contextlib
import sys

from ortlm.cli import Subparsers
from ortlm.cli.conversation import Talk
from ortlm.cli.generate import add_images
from ortlm.cli.machine import add_machine, device_of, without_blas_threads
from ortlm.cli.output import tell
from ortlm.cli.settings import add_settings, settings_of, with_model
from ortlm.errors import BadOption

_EXAMPLES = '''\
examples:
  ortlm chat phi --temp 0.7
  ortlm chat phi --system "Answer in one sentence."
  printf 'Hello\\nAnd in French?\\n' | ortlm chat phi

Lines between """ and """ are one message. /help lists commands. Ctrl-C stops an
answer, Ctrl-D leaves.
'''


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "chat",
        help="chat with a model",
        usage="ortlm chat MODEL [options]",
        description="Chat with a model in the terminal, or answer each line of stdin.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_images(parser)
    add_settings(parser, answers=False)
    output = parser.add_argument_group("output")
    output.add_argument(
        "-v", "--verbose", action="store_true", help="write speed to stderr after each answer"
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends."""
    without_blas_threads()
    settings = settings_of(args)
    from ortlm.runtime.language_model import load

    lm = load(args.model, threads=args.threads, **device_of(args))
    if lm.chat_template is None:
        raise BadOption(
            f"{args.model} has no chat template. Use `ortlm generate`, or put the publisher's "
            "chat_template.jinja into the folder."
        )
    settings = with_model(settings, lm, args)
    # Told now rather than at every answer: an unknown adapter, a token that the model has not.
    lm.generator(settings)
    if args.num_crops is not None and lm.vision_encoder is None:
        raise BadOption(f"--num-crops does not apply: {args.model} is a text model.")
    talk = Talk(lm, settings, system=args.system, verbose=args.verbose, num_crops=args.num_crops)
    tell("/help lists commands, /bye or Ctrl-D leaves.")
    leaving = False
    while True:
        try:
            text = _read()
        except KeyboardInterrupt:
            tell("")
            # A program that reads a pipe has nobody to ask.
            if leaving or not sys.stdin.isatty():
                raise
            leaving = not _typed()
            if leaving:
                tell("(Ctrl-C once more leaves, /bye too)")
            continue
        leaving = False
        if text is None or not talk.take(text):
            return 0


def _typed() -> bool:
    """Return whether Ctrl-C dropped a line that had been begun."""
    readline = sys.modules.get("readline")
    return readline is not None and bool(readline.get_line_buffer().strip())


def _read() -> str | None:
    """Return the next message, None at the end of the input."""
    line = _line(">>> ")
    if line is None or not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        try:
            more = _line("... ")
        except KeyboardInterrupt:
            tell("\n(message dropped)")
            return ""
        if more is None:
            break
        lines.append(more)
    return "\n".join(lines).removesuffix('"""').strip("\n")


def _line(prompt: str) -> str | None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history and editing
        try:
            return input(prompt)
        except EOFError:
            sys.stdout.write("\n")
            return None
    if sys.stdin.isatty():
        # Answers go to a file, where prompts have no place.
        sys.stderr.write(prompt)
        sys.stderr.flush()
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise BadOption(f"stdin is no UTF-8 text: {error}.") from error
    return line.removesuffix("\n") if line else None
