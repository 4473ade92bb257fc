"""What ends a command: one line and an exit code, whatever a library raises, and no control of the terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
from pathlib import Path

import pytest

import ortlm
from ortlm._utils.formatting import printable
from ortlm.cli import inspect as command
from ortlm.cli import main, output
from ortlm.errors import BadArtifact, is_panic


def raising(error):
    def run(args):
        raise error

    return run


def panic() -> BaseException:
    from tokenizers import Tokenizer

    broken = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    tokenizer = Tokenizer.from_str(json.dumps({"pre_tokenizer": broken, "model": model, "added_tokens": []}))
    with pytest.raises(BaseException) as caught:
        tokenizer.encode("a" * 60 + "b")
    return caught.value


def ort_errors() -> list[Exception]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 10
    return [kind("boom") for kind in kinds]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "there is not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (BadArtifact("a\x1b[2Jb\r\x07"), r"error: a\u001b[2Jb\u000d\u0007"),
        (
            OSError(28, "No space left on device", "/full/x"),
            "/full/x: No space left on device",
        ),
    ],
)
def test_errors_of_any_kind(monkeypatch, capsys, error, line):
    monkeypatch.setattr(command, "run", raising(error))
    assert main(["inspect", "x"]) == 1
    told = capsys.readouterr().err
    assert line in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_errors_of_onnx_runtime(monkeypatch, capsys):
    for error in ort_errors():
        monkeypatch.setattr(command, "run", raising(error))
        assert main(["inspect", "x"]) == 1
        assert capsys.readouterr().err.strip() == "error: ONNX Runtime failed: boom"


def test_panics(monkeypatch, capfd):
    error = panic()
    assert is_panic(error)
    assert not isinstance(error, Exception)
    monkeypatch.setattr(command, "run", raising(error))
    assert main(["inspect", "x"]) == 1
    assert "error: a library failed on this input: " in capfd.readouterr().err


def test_faults_of_ortlm_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(command, "run", raising(KeyError("x")))
    with pytest.raises(KeyError):
        main(["inspect", "x"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(5)])
def test_what_is_no_error(monkeypatch, capsys, error):
    monkeypatch.setattr(command, "run", raising(error))
    assert main(["inspect", "x"]) == (130 if isinstance(error, KeyboardInterrupt) else 5)
    assert capsys.readouterr().err == ("interrupted.\n" if isinstance(error, KeyboardInterrupt) else "")


def test_printable():
    assert printable("a\tb\nc é \N{GRINNING FACE}") == "a\tb\nc é \N{GRINNING FACE}"
    for bad in ("\x1b", "\x00", "\x07", "\x08", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028"):
        assert printable(f"x{bad}y") == f"x\\u{ord(bad):04x}y"
    # A line of JSON stays one, and says the same.
    assert json.loads(printable(json.dumps("\x9b\x1b", ensure_ascii=False))) == "\x9b\x1b"


def test_log_messages(monkeypatch, capsys):
    output.set_up(verbose=False)
    logging.getLogger("ortlm.x").warning("from a file: %s", "\x1b]0;owned\x07")
    assert capsys.readouterr().err == "from a file: \\u001b]0;owned\\u0007\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_generated_text(monkeypatch):
    for stream, written in ((Terminal(), "a\\u001b[31mb\n"), (io.StringIO(), "a\x1b[31mb\r\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        output.write_generated("a\x1b[31mb\r\n")
        assert stream.getvalue() == written


def test_tables_and_progress(monkeypatch):
    from rich.progress import Progress
    from rich.table import Table

    terminal = Terminal()
    console = output.console(file=terminal, force_terminal=True, width=100)
    table = Table(title="t\x1b]0;x\x07[link=http://x]y[/link]")
    table.add_row("\x1b[2Jcell", "[/nothing]")
    console.print(table)
    console.print("\x1b[2Jline :smile:", style="bold")
    with Progress(console=console) as bars:
        bars.add_task("\x1b[2Jtask", total=1)
    with console.status("\x1b[2Jstatus"):
        pass
    written = terminal.getvalue()
    for bad in ("\x1b[2J", "\x1b]", "\x07"):
        assert bad not in written
    for shown in ("[link=http://x]", "[/nothing]", "u001b", ":smile:"):
        assert shown in written


def test_everything_is_printed_by_one_file():
    folder = Path(ortlm.__file__).parent / "cli"
    for path in folder.glob("*.py"):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("print", "Console", "rich.print"), f"{path.name}:{node.lineno}"
