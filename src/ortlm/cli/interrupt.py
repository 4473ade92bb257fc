"""Ctrl-C while a model runs: it ends the answer at once, a long prompt's too, and nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

_T = TypeVar("_T")
_LOOK_SECONDS = 0.2


def stoppable(work: Callable[[], _T], stop: Callable[[], None]) -> _T | None:
    """Return what ``work`` returns, or None if Ctrl-C came; it then calls ``stop``, after which ``work`` must end.

    ``work`` runs in another thread, because Python sees a signal only between two steps of the main one, and a
    single run of a model can take minutes. Raises what ``work`` raises.
    """
    future: Future[_T] = Future()
    ended = threading.Event()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        ended.set()

    # A daemon, so that a second way out, such as SIGTERM, does not wait for the model.
    thread = threading.Thread(target=run, name="ortlm-generate", daemon=True)
    with _on_ctrl_c(stop) as came:
        thread.start()
        # With a limit: elsewhere than on Unix, a signal does not end a wait.
        while not ended.wait(_LOOK_SECONDS):
            pass
        thread.join()
    return None if came.is_set() else future.result()


@contextmanager
def _on_ctrl_c(stop: Callable[[], None]) -> Iterator[threading.Event]:
    """Call ``stop`` at the first Ctrl-C in place of raising KeyboardInterrupt; the event says that it came."""
    came = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if not came.is_set():
            came.set()
            stop()

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
