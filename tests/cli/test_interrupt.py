"""Ctrl-C ends the work that it is meant for, and nothing else."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from ortlm.cli.interrupt import stoppable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Unix")


def test_work_runs_to_its_end():
    assert stoppable(lambda: 5, lambda: None) == 5


def test_errors_are_raised_where_the_work_was_asked_for():
    with pytest.raises(ZeroDivisionError):
        stoppable(lambda: 1 / 0, lambda: None)


def test_ctrl_c_stops_the_work_once():
    stops: list[int] = []
    asked = threading.Event()

    def stop() -> None:
        stops.append(1)
        asked.set()

    def work() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        # As in a model's run: nothing but ``stop`` ends it.
        assert asked.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        return 5

    before = signal.getsignal(signal.SIGINT)
    assert stoppable(work, stop) is None
    assert stops == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_of_stopped_work_is_not_told():
    asked = threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        asked.wait(30)
        raise ValueError("half done")

    assert stoppable(work, asked.set) is None
