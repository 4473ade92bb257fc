"""The one way to open, read or copy a file of a folder that strangers made: a checkpoint, an adapter, a fine-tune.

Such a folder comes from a download, a git clone or an archive, which keep links. A link to ``~/.ssh/id_rsa`` or
``/proc/self/environ`` that is called LICENSE would become part of what people publish, so:

- the real path of a file lies in the folder itself or, in the hub's cache, among the ``blobs`` of the same model;
- only regular files are read: a pipe never ends, a device is no file of a model;
- every kind of file has a size that none of its kind reaches.

That file and folder lie on one device is not asked for: overlay file systems report several for one folder.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import parse_object
from ortlm._utils.formatting import printable
from ortlm.errors import BadCheckpoint

_MB = 1 << 20
# How large a file may be, by the first pattern that its name matches; None: as large as it is.
_LIMITS: tuple[tuple[str, int | None], ...] = (
    ("*.safetensors", None),
    ("*.gguf", None),
    ("*.bin", None),
    ("*.index.json", 64 * _MB),
    ("tokenizer_config.json", 16 * _MB),
    ("tokenizer.*", 64 * _MB),
    ("vocab.*", 64 * _MB),
    ("merges.txt", 64 * _MB),
    ("added_tokens.json", 64 * _MB),
    ("tekken.json", 64 * _MB),
    ("LICEN[CS]E*", _MB),
    ("NOTICE*", _MB),
    ("USE_POLICY*", _MB),
    ("*.jinja", _MB),
    ("*", 4 * _MB),
)
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def present(folder: Path, name: str) -> bool:
    """Whether ``folder`` has something called ``name``, of whatever kind; opening it says if it can be read."""
    try:
        return os.path.lexists(folder / name)
    except ValueError:  # a null byte
        return False


def listed(folder: Path, pattern: str, *, most: int = 100) -> list[str]:
    """Return the names in ``folder`` that match ``pattern``, sorted, without folders and names that are no text.

    A ``/`` in the pattern stands before the part that is matched: ``templates/*.jinja``. Raises BadCheckpoint if
    there are more than ``most``.
    """
    place, _, last = pattern.rpartition("/")
    where = folder / place
    if place and not present(folder, place):
        return []
    if not _belongs(os.path.realpath(where), folder, hidden=False):
        raise BadCheckpoint(f"{shown(where)} leads out of {shown(folder)}, so it is not read. Remove it.")
    try:
        with os.scandir(where) as entries:
            # A name that is no text (broken bytes) could not be recorded in the manifest.
            names = [
                f"{place}/{entry.name}" if place else entry.name
                for entry in entries
                if fnmatch.fnmatchcase(entry.name, last) and entry.name.isprintable() and not entry.is_dir()
            ]
    except OSError as error:
        raise BadCheckpoint(f"{shown(where)} cannot be listed: {error.strerror or error}.") from error
    if len(names) > most:
        raise BadCheckpoint(
            f"{shown(where)} holds {len(names):,} files like {last}; at most {most} are read. Remove those that "
            "are not the model's."
        )
    return sorted(names)


def open_file(folder: Path, name: str) -> io.FileIO:
    """Open the file ``name`` of ``folder`` for reading, without a buffer.

    Raises BadCheckpoint if it leads out of the folder, is not a regular file, is too large, or cannot be read.
    """
    return _open(folder, name, limit_of(name))


def open_weights(folder: Path, name: str) -> io.FileIO:
    """Open the file ``name`` of ``folder`` as ``open_file`` does, however large it is."""
    return _open(folder, name, None)


def read_bytes(folder: Path, name: str) -> bytes:
    """Return what the file ``name`` of ``folder`` holds; see ``open_file``."""
    with open_file(folder, name) as file:
        return b"".join(_blocks(file, folder / name, limit_of(name)))


def read_start(folder: Path, name: str, most: int) -> bytes:
    """Return the first ``most`` bytes of the file ``name`` of ``folder``, however long that is."""
    found = b""
    with _open(folder, name, None) as file:
        for block in _blocks(file, folder / name, None):
            found += block
            if len(found) >= most:
                break
    return found[:most]


def read_text(folder: Path, name: str) -> str:
    """Return the UTF-8 text in the file ``name`` of ``folder``; see ``open_file``."""
    raw = read_bytes(folder, name)
    try:
        # Some editors put a byte order mark first.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadCheckpoint(
            f"{shown(folder / name)} is not text in UTF-8: byte {error.start} is {raw[error.start]:#04x}. "
            "Save it as UTF-8, or download it again."
        ) from error


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in the file ``name`` of ``folder``; see ``open_file`` and ``checked_json.parse``."""
    return parse_object(read_text(folder, name), where=shown(folder / name), error=BadCheckpoint)


def size_of(folder: Path, name: str) -> int:
    """Return how many bytes the file ``name`` of ``folder`` has; see ``open_file``."""
    with open_file(folder, name) as file:
        return os.fstat(file.fileno()).st_size


def copy_file(folder: Path, name: str, to: Path) -> None:
    """Copy the file ``name`` of ``folder`` to the file ``to``; see ``open_file``."""
    with open_file(folder, name) as file, to.open("wb") as copy:
        for block in _blocks(file, folder / name, limit_of(name)):
            copy.write(block)


def limit_of(name: str) -> int | None:
    """Return how many bytes a file called ``name`` may have, None if as many as it likes."""
    last = name.rpartition("/")[2]
    return next(limit for pattern, limit in _LIMITS if fnmatch.fnmatchcase(last, pattern))


def shown(path: Path | str) -> str:
    """Return ``path`` as messages show it: on one line, without control characters."""
    return printable(str(path)).replace("\n", "\\n").replace("\t", "\\t").encode(errors="replace").decode()


# --- weights, which are opened again and again --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which file it was when it was looked at, and which content: ``open`` gives that or an error."""

    path: Path
    real: str
    state: tuple[int, int, int, int]

    @classmethod
    def of(cls, file: io.FileIO, path: Path) -> Stamp:
        """Return the stamp of ``file``, which ``open_file`` gave for ``path``."""
        return cls(path, str(file.name), _state(file))

    def open(self) -> io.FileIO:
        """Open the file again, without a buffer. Raises BadCheckpoint if it is another one or was written to."""
        try:
            file = io.FileIO(self.real, "rb", opener=_opener)
        except OSError as error:
            raise BadCheckpoint(
                f"{shown(self.path)} cannot be read any longer: {error.strerror or error}. It was there when the "
                "build began; start again."
            ) from error
        if _state(file) != self.state:
            file.close()
            raise BadCheckpoint(
                f"{shown(self.path)} has changed since the build began: its size, its time or the file itself. "
                "Wait until nothing writes to the checkpoint, then start again."
            )
        return file


def _state(file: io.FileIO) -> tuple[int, int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


# --- one file -----------------------------------------------------------------------------------------------


def _open(folder: Path, name: str, limit: int | None) -> io.FileIO:
    path = folder / name
    try:
        real = os.path.realpath(path, strict=True)
        if not _belongs(real, folder, hidden=limit_of(name) is None):
            raise BadCheckpoint(
                f"{shown(path)} leads to {shown(real)}, which is no file of this folder, so it is not read. Put "
                "the file itself in its place, or remove it."
            )
        file = io.FileIO(real, "rb", opener=_opener)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise BadCheckpoint(
            f"{shown(path)}{_whither(path)} cannot be read: {reason}. Copy or download it again."
        ) from error
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and (limit is None or found.st_size <= limit):
        return file
    file.close()
    if stat.S_ISREG(found.st_mode):
        raise _too_long(path, limit, found.st_size)
    kind = next((word for is_kind, word in _KINDS if is_kind(found.st_mode)), "something else")
    raise BadCheckpoint(f"{shown(path)} is {kind}, not a regular file. Put the file there, or remove it.")


def _opener(path: str, flags: int) -> int:
    # Without waiting for a writer if it is a pipe, and not through a link that was put there since.
    for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_NOCTTY"):
        flags |= getattr(os, flag, 0)
    return os.open(path, flags)


def _blocks(file: io.FileIO, path: Path, limit: int | None) -> Iterator[bytes]:
    """Yield what is left of ``file``. Raises BadCheckpoint for more than ``limit`` bytes: it may grow."""
    total = 0
    while True:
        try:
            block = file.read(_MB)
        except OSError as error:
            raise BadCheckpoint(
                f"{shown(path)} cannot be read: {error.strerror or error}. Copy or download it again."
            ) from error
        if not block:
            return
        total += len(block)
        if limit is not None and total > limit:
            raise _too_long(path, limit, total)
        yield block


def _too_long(path: Path, limit: int | None, found: int) -> BadCheckpoint:
    return BadCheckpoint(
        f"{shown(path)} has {found:,} bytes; a file of this kind has at most {limit:,}. Download it again, or "
        "remove it."
    )


def _belongs(real: str, folder: Path, *, hidden: bool) -> bool:
    """Whether the real path ``real`` is a file of ``folder``; of folders in it like .git only if ``hidden``."""
    root = Path(os.path.realpath(folder))
    file = Path(real)
    if file.is_relative_to(root):
        # A clone's .git holds addresses with passwords; git-annex keeps weights there.
        return hidden or not any(part.startswith(".") for part in file.relative_to(root).parts[:-1])
    for part in (root, *root.parents):
        model = part.parent.parent
        if part.parent.name == "snapshots" and model.name.startswith("models--"):
            return file.parent == model / "blobs" and _BLOB.fullmatch(file.name) is not None
    return False


def _whither(path: Path) -> str:
    try:
        return f", a link to {shown(path.readlink())},"
    except (OSError, ValueError):
        return ""


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
