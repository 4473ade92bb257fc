"""Backs the weights in memory with huge pages, which makes decoding 5 to 10 % faster.

A step reads every weight once. With pages of 4 kB the processor spends a good part of that time on finding them;
with 2 MB ones it does not. Most Linux systems give huge pages only to programs that ask for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise(2); MADV_COLLAPSE came with Linux 6.1, older kernels refuse it
_HUGE = 1 << 21
# Smaller regions are thread stacks and Python's own memory.
_SMALLEST_BYTES = 4 << 20
# The system is asked for this much at a time: a page fault elsewhere waits for one call at most.
_PIECE_BYTES = 4 << 20
_LEAST_PRIORITY = 19
_MMAP_THRESHOLD = -3  # mallopt(3)
_LEAST_GIVEN_BACK_BYTES = (16 << 20) - (64 << 10)
_MOST_KEPT_BYTES = (32 << 20) - (64 << 10)  # glibc's limit, less what it needs itself

_threads: list[threading.Thread] = []


def use_huge_pages() -> None:
    """Put all large private memory of this process on huge pages, which takes a copy.

    That is a quarter of a second per GB, several times as long where free memory is in small pieces. Does nothing
    where the system does not offer huge pages on request (Linux with ``transparent_hugepage`` set to ``madvise``).
    """
    if not _on_request():
        return
    madvise = _libc().madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    gained = 0
    for low, high in sorted(_large_regions()):
        for start in range(low, high, _PIECE_BYTES):
            size = min(_PIECE_BYTES, high - start)
            # A region may be gone by now: then both calls fail, which does no harm.
            madvise(start, size, _HUGEPAGE)
            gained += size if madvise(start, size, _COLLAPSE) == 0 else 0
    _log.info("%d MB of memory are on huge pages", gained // 1_000_000)


def use_huge_pages_soon() -> None:
    """Let ``use_huge_pages`` run in a thread of its own, which leaves the processor to whoever wants it.

    The process may end in the middle of it, and memory may be used meanwhile.
    """
    if not _on_request():
        return

    def work() -> None:
        # On Linux a priority is a thread's own.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        use_huge_pages()

    thread = threading.Thread(target=work, name="huge pages", daemon=True)
    _threads[:] = [other for other in _threads if other.is_alive()]
    _threads.append(thread)
    thread.start()


def wait_for_huge_pages() -> None:
    """Wait until every ``use_huge_pages_soon`` has done its work: what is measured afterwards is undisturbed."""
    for thread in tuple(_threads):
        thread.join()


def give_back_freed_memory() -> None:
    """Give what was freed back to the system.

    Whatever ONNX Runtime computes while it loads a graph, it computes on the C library's heap, where the weights
    that it keeps lie between what it has freed: several times the size of the model, that would stay with the
    process. Takes some milliseconds. glibc only.
    """
    with contextlib.suppress(AttributeError, OSError):
        _libc().malloc_trim(0)


def keep_freed_memory() -> None:
    """Let the C library keep what arrays of up to 32 MB free, instead of giving it back to the system each time.

    Logits of a large vocabulary take some hundred kB; without this, every copy of them is new memory that
    the system has to clear first, which takes longer than the copy. glibc adapts to what a program frees, so
    allocating and freeing one such array once is all it takes; other C libraries are not affected.
    """
    np.empty(_MOST_KEPT_BYTES, dtype=np.uint8)


@contextlib.contextmanager
def give_back_at_once() -> Iterator[None]:
    """Let the C library give back what arrays of more than 16 MB free, as soon as they do.

    Otherwise those of up to 32 MB lie on its heap, and where they come and go between what stays, it grows: to
    twice what is in use while a model is calibrated. Smaller ones come and go so often that it would take time.
    glibc only.
    """
    with contextlib.suppress(AttributeError, OSError):
        _libc().mallopt(_MMAP_THRESHOLD, _LEAST_GIVEN_BACK_BYTES)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError, OSError):
            _libc().mallopt(_MMAP_THRESHOLD, _MOST_KEPT_BYTES)
            _libc().malloc_trim(0)


def _on_request() -> bool:
    """Return whether the system gives huge pages to programs that ask, and to no others."""
    try:
        return sys.platform.startswith("linux") and "[madvise]" in _SETTING.read_text(encoding="ascii")
    except OSError:
        return False


@functools.cache
def _libc() -> Any:
    """Return the C library that this process runs on; OSError where it cannot be named that way (Windows)."""
    if sys.platform == "win32":
        raise OSError("there is no C library to ask")
    return ctypes.CDLL(None)


def _large_regions() -> set[tuple[int, int]]:
    """Return start and end of this process's large anonymous regions, cut to whole huge pages."""
    try:
        maps = _MAPS.read_text(encoding="utf-8")
    except OSError:
        return set()
    spans = set()
    for line in maps.splitlines():
        fields = line.split()
        if fields[5:] not in ([], ["[heap]"]) or fields[1] != "rw-p":
            continue  # a file or a stack
        low, high = (int(number, 16) for number in fields[0].split("-"))
        low, high = -(-low // _HUGE) * _HUGE, high // _HUGE * _HUGE
        if high - low >= _SMALLEST_BYTES:
            spans.add((low, high))
    return spans
