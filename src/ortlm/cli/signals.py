"""Signals that end a command: each raises ``Interrupted``, a KeyboardInterrupt that knows which one came."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 0.02


class Interrupted(KeyboardInterrupt):
    """The signal ``number`` came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def interrupting(*names: str) -> Iterator[None]:
    """Within the block, let the signals ``names`` raise ``Interrupted`` in place of what they do by default.

    A signal during an import waits for its end: extension modules that are interrupted while they import something
    raise an ImportError instead, or crash. Signals that are ignored, as nohup asks for, or that have a handler
    stay as they are. Only the main thread can change signals; in others nothing changes.
    """
    imports, main = _imports(sys._getframe()), threading.main_thread()
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if _imports(frame) == imports:
            raise Interrupted(number)
        # Not a threading.Timer: its locks may be held by what the signal interrupted.
        _thread.start_new_thread(again, (number,))

    def again(number: int) -> None:
        time.sleep(_AGAIN_SECONDS)
        if number not in before:
            return
        if hasattr(signal, "pthread_kill"):
            # It ends a wait for the system too, for a process or the network.
            signal.pthread_kill(main.ident or 0, number)
        else:
            signal.raise_signal(number)

    try:
        if threading.current_thread() is main:
            for name in names:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) in defaults:
                    before[number] = signal.signal(number, handle)
        yield
    finally:
        while before:
            signal.signal(*before.popitem())


def _imports(frame: FrameType | None) -> int:
    """Return how many calls of Python's import system ``frame`` and its callers are."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count
