"""Help fits into a terminal of 80 columns, and its examples are commands that the parser takes."""

from __future__ import annotations

import importlib
import re
import shlex
from argparse import ArgumentParser

import pytest

from ortlm.cli import COMMANDS, main


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS)], ids=lambda command: "".join(command)
)
def test_no_line_is_wider_than_a_terminal(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []


def examples() -> list[str]:
    """Return the examples of every command's help."""
    found = []
    for module, _ in COMMANDS.values():
        text = importlib.import_module(module)._EXAMPLES
        found += re.findall(r"^  (?:\w.* \| )?(ortlm .*?)(?: [|>].*)?$", text, re.MULTILINE)
    return found


@pytest.mark.parametrize("example", examples())
def test_examples_parse(example: str) -> None:
    _, command, *arguments = shlex.split(example)
    subparsers = ArgumentParser().add_subparsers()
    importlib.import_module(COMMANDS[command][0]).add_parser(subparsers)
    subparsers.choices[command].parse_intermixed_args(arguments)
