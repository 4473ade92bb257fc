"""Arrays in a file without a name, which the system may take out of memory.

What ONNX Runtime reads only while it loads a graph, but may refer to as long as there is a session, need not stay
in main memory for that: in a file it can be written out, and whoever looked at it again would find it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ortlm.dtypes import Array

# Files there lie on a disk; /tmp is main memory on many systems.
_FOLDER = Path("/var/tmp")
_PAGE_BYTES = 4096


class ScratchFile:
    """A file for arrays, gone with the last of them. ``keep`` may be called by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._end = 0
        self._map: mmap.mmap | None = None

    def keep(self, array: Array) -> int | None:
        """Write ``array``, contiguous, and return its place; None if that is not possible here."""
        # Windows has no writing at a place, and no memory that may be forgotten.
        if not hasattr(os, "pwrite") or not hasattr(mmap.mmap, "madvise"):
            return None
        try:
            with self._lock:
                if self._file is None:
                    self._file = _opened()
                place, self._end = self._end, self._end + -(-array.nbytes // _PAGE_BYTES) * _PAGE_BYTES
            data = array.data.cast("B")
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], place + done)
        except OSError:  # no folder, or no room
            return None
        return place

    def read(self, place: int, shape: Sequence[int], kind: np.dtype[Any]) -> Array:
        """Return what was kept at ``place``, of this shape and type, in memory that cannot be written.

        Nothing can be kept any more once something was read.
        """
        if self._map is None:
            assert self._file is not None
            # The last page is not written to its end.
            with self._file as file:
                os.ftruncate(file.fileno(), self._end)
                self._map = mmap.mmap(file.fileno(), self._end, mmap.MAP_SHARED, mmap.PROT_READ)
        return np.frombuffer(self._map, kind, math.prod(shape), place).reshape(shape)

    def rest(self) -> None:
        """Take what was read out of this process's memory. It comes back when somebody looks."""
        if self._file is not None:
            self._file.close()
        if self._map is not None:
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)


def _opened() -> IO[bytes]:
    """Return a new file without a name, where the user wants such files, or else on a disk."""
    # Most models need no such file, and it takes a while to import.
    import tempfile

    folder = None if "TMPDIR" in os.environ or not os.access(_FOLDER, os.W_OK) else _FOLDER
    return tempfile.TemporaryFile(dir=folder, buffering=0)
