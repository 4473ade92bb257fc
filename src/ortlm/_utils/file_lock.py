"""Locks between processes, which end with the process that holds them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int, *, wait: bool) -> None:
        msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int, *, wait: bool) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def lock(path: Path, *, wait: bool) -> int:
    """Return a handle of the file ``path``, made if need be, that locks it until it is closed.

    Raises BlockingIOError or PermissionError if another process holds the lock and it does not ``wait``, and
    OSError on file systems without locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, wait=wait)
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file ``path`` within the block, after waiting for it."""
    handle = lock(path, wait=True)
    try:
        yield
    finally:
        os.close(handle)
