"""Signals that end a command arrive as Interrupted, whatever was running; other handlers stay."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from ortlm.cli import INTERRUPTED, main
from ortlm.cli.signals import Interrupted, interrupting

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Unix")


def import_as_c_does(number: signal.Signals) -> None:
    """Fail as an extension module does whose own import was interrupted."""
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        raise ImportError("no such module") from None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_and_its_handler_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, interrupting(number.name):
        os.kill(os.getpid(), number)
    assert caught.value.number == number
    assert signal.getsignal(number) is before


def test_an_interrupted_import_is_an_interrupt():
    with pytest.raises(Interrupted) as caught, interrupting("SIGTERM"):
        import_as_c_does(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


def test_other_failed_imports_stay_as_they_are():
    with pytest.raises(ImportError, match="no such module"), interrupting("SIGINT"):
        raise ImportError("no such module")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_signals_that_are_handled_elsewhere_stay_so(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with interrupting("SIGTERM", "NOT_HERE"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupted_import_ends_a_command_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr("ortlm.cli.inspect.run", lambda args: import_as_c_does(signal.SIGINT))
    assert main(["inspect", "folder"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted.\n"
