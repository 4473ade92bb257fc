"""Signals that end a command arrive as Interrupted, whatever was running; other handlers stay."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time

import pytest

from ortlm.cli import INTERRUPTED, main
from ortlm.cli.signals import Interrupted, interrupting

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Unix")


MODULE = """
import os, signal, time

os.kill(os.getpid(), signal.{signal})
time.sleep(0.1)
LOADED = True
"""


def import_and_wait(name: str) -> None:
    importlib.import_module(name)
    time.sleep(60)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module in which a signal comes while it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "interrupted_module", raising=False)

    def write(number: signal.Signals) -> str:
        (tmp_path / "interrupted_module.py").write_text(MODULE.format(signal=number.name))
        return "interrupted_module"

    return write


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_and_its_handler_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, interrupting(number.name):
        os.kill(os.getpid(), number)
    assert caught.value.number == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_an_import(number, module):
    name, began = module(number), time.monotonic()
    with pytest.raises(Interrupted) as caught, interrupting(number.name):
        import_and_wait(name)
    assert caught.value.number == number
    assert sys.modules[name].LOADED
    assert time.monotonic() - began < 30


def test_a_signal_of_an_import_is_forgotten_with_the_block(module):
    with interrupting("SIGINT"):
        importlib.import_module(module(signal.SIGINT))
    time.sleep(0.1)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_signals_that_are_handled_elsewhere_stay_so(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with interrupting("SIGTERM", "NOT_HERE"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_that_is_interrupted_while_it_imports_says_so_in_one_line(module, monkeypatch, capsys):
    name = module(signal.SIGINT)
    monkeypatch.setattr("ortlm.cli.inspect.run", lambda args: import_and_wait(name))
    assert main(["inspect", "folder"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted.\n"
