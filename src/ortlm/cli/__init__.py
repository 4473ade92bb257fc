"""The command line: ``ortlm COMMAND``, see COMMANDS.

Each command is a module with ``add_parser(subparsers)`` and ``run(args) -> int``. Only the requested command
is imported, and nothing heavy before its ``run``. Results go to stdout, all else to stderr.

Exit codes: 0 done, 1 failed, 2 usage error, 3 above a quality threshold, 130 interrupted (143 by
SIGTERM).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

from ortlm._utils.formatting import system_error
from ortlm._version import __version__
from ortlm.cli import output
from ortlm.cli.signals import interrupting
from ortlm.errors import BadOption, Error, is_panic, nearest

# What ``add_parser`` of a command takes.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DONE, FAILED, USAGE_ERROR, ABOVE_THRESHOLD, INTERRUPTED = 0, 1, 2, 3, 130

# command -> (module, what it does)
COMMANDS = {
    "build": ("ortlm.cli.build", "turn a Hugging Face model into a quantized ONNX model"),
    "generate": ("ortlm.cli.generate", "continue a prompt"),
    "chat": ("ortlm.cli.chat", "chat with a model"),
    "serve": ("ortlm.cli.serve", "serve models over HTTP, as OpenAI's API"),
    "batch": ("ortlm.cli.batch", "answer a file of requests, as OpenAI's Batch API does"),
    "embed": ("ortlm.cli.embed", "embed texts"),
    "evaluate": ("ortlm.cli.evaluate", "compare a built model with the original"),
    "inspect": ("ortlm.cli.inspect", "show what a built model is and what it needs"),
    "upload": ("ortlm.cli.upload", "upload a built model to the Hugging Face hub"),
    "devices": ("ortlm.cli.devices", "list what this machine can run models on"),
    "bench": ("ortlm.cli.bench", "measure how fast a built model is on this machine"),
}

_EXAMPLES = """\
examples:
  ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi
  ortlm generate phi "The capital of France is" -n 32
  ortlm chat phi

`ortlm COMMAND --help` shows the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (by default the process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with interrupting("SIGINT"):
            return _dispatch(arguments)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else DONE if exit_.code is None else FAILED
    except KeyboardInterrupt as interrupt:
        # A command that left something to say has put it there.
        output.tell(str(interrupt) or "interrupted.")
        # By another signal than Ctrl-C: what a shell says of a process that it ended.
        return 128 + getattr(interrupt, "number", INTERRUPTED - 128)
    except BrokenPipeError:
        # Whoever read our output has enough; without this, Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except BadOption as error:
        return _complain(str(error), USAGE_ERROR)
    except Error as error:
        return _complain(str(error), FAILED)
    except OSError as error:
        return _complain(system_error(error), FAILED)
    except BaseException as error:
        message = _of_library(error)
        if message is None:
            raise
        return _complain(message, FAILED)


class _Parser(argparse.ArgumentParser):
    """A command's parser: arguments may come before, between and after options."""

    _nested = False

    # The types of argparse's overloads are not worth repeating for an override that hands everything on.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._nested:
            return super().parse_known_args(args, namespace)
        self._nested = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._nested = False


class _Help(argparse.RawDescriptionHelpFormatter):
    """Lists commands without a line for their placeholder."""

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(self._format_action(command) for command in action._get_subactions())
        return super()._format_action(action)


def _dispatch(arguments: list[str]) -> int:
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        raise BadOption(
            f"there is no command {command!r}; there is {', '.join(COMMANDS)}." + nearest(command, COMMANDS)
        )
    parser = argparse.ArgumentParser(
        prog="ortlm",
        description="Turn Hugging Face language models into quantized ONNX models and run them.",
        epilog=_EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"ortlm {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", parser_class=_Parser
    )
    for name, (module, summary) in COMMANDS.items():
        if name == command:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE_ERROR
    args, unknown = parser.parse_known_args(arguments)
    if args.command is None:
        parser.error("a command is missing")
    if unknown:
        raise _unknown(args.command, unknown[0], subparsers.choices[args.command])
    output.set_up(verbose=bool(getattr(args, "verbose", False)))
    code: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.flush()
    return code


def _unknown(command: str, word: str, parser: argparse.ArgumentParser) -> BadOption:
    """Name what a command does not know; argparse would name its value too, and no nearest known name."""
    word = word.partition("=")[0]
    if word.startswith("-"):
        hint = nearest(word, [name for name in parser._option_string_actions if name.startswith("--")])
    else:
        hint = " Put quotes around a text that has spaces."
    return BadOption(f"ortlm {command} does not know {word!r}.{hint} See ortlm {command} --help.")


def _of_library(error: BaseException) -> str | None:
    """Return one line for what input of unusual size or form makes libraries raise, None for a fault of ortlm."""
    if isinstance(error, MemoryError):
        detail = f": {error}" if str(error) else ""
        return f"there is not enough memory{detail}. Ask for less at once, or use a machine that has more."
    if isinstance(error, RecursionError):
        return f"the input is nested too deeply ({error})."
    if is_panic(error):
        return f"a library failed on this input: {error}"
    # By name: importing it takes long, and whoever raised it has.
    if type(error).__module__.startswith("onnxruntime."):
        return f"ONNX Runtime failed: {error}"
    return None


def _complain(message: str, code: int) -> int:
    output.tell(f"error: {message}")
    return code
