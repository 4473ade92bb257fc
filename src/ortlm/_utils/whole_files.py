"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Write all of ``files``, or none: each first next to its place, then all are given their names.

    Raises OSError, with the path, if one cannot be written; what was there before is still there then.
    """
    alongside = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in files}
    try:
        for path, content in files.items():
            with naming(path), alongside[path].open("xb") as stream:
                stream.write(content)
                stream.flush()
                # Some file systems tell only now that there is no room.
                os.fsync(stream.fileno())
        for path, new in alongside.items():
            with naming(path):
                new.replace(path)
    finally:
        for new in alongside.values():
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put ``path`` into an OSError that comes of the block: one of writing, such as of a full disk, names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
