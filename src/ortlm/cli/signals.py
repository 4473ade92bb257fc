"""Signals that end a command: each raises ``Interrupted``, a KeyboardInterrupt that knows which one came."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The signal ``number`` came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def interrupting(*names: str) -> Iterator[None]:
    """Within the block, let the signals ``names`` raise ``Interrupted`` in place of what they do by default.

    Signals that are ignored, as nohup asks for, or that have a handler stay as they are. Only the main thread can
    change signals; in others nothing changes.
    """
    came: list[int] = []
    before = {}

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Interrupted(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for name in names:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) in (
                    signal.SIG_DFL,
                    signal.default_int_handler,
                ):
                    before[number] = signal.signal(number, handle)
        yield
    except ImportError as error:
        # C code that imports something, as numpy's does, puts an error of its own in the place of what was raised.
        if came:
            raise Interrupted(came[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
