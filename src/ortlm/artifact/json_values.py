"""JSON of an artifact, read with types: a value of another kind is an error that is told."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PureWindowsPath
from typing import Any

from ortlm._utils.checked_json import read_object, shown
from ortlm.errors import BadArtifact

# Of a model with 10,000 layers and 100 adapters it is a third of that.
MOST_JSON_BYTES = 16 << 20

# What file systems take.
_MOST_NAME = 255

# What reading a value of another type than expected may raise.
WRONG = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def mapping(found: Any) -> dict[str, Any]:
    """Return an object of JSON, empty for null; ``TypeError`` for anything else."""
    if found is not None and not isinstance(found, dict):
        raise TypeError(f"expected an object, found {shown(found)}")
    return found or {}


def names(found: Any) -> dict[str, str]:
    """Return names of tensors by role; ``TypeError`` for anything else."""
    given = mapping(found)
    for role, name in given.items():
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a tensor for {shown(role)}, found {shown(name)}")
    return given


def integer(found: Any) -> int:
    """Return a whole number; ``TypeError`` for anything else."""
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"expected a whole number, found {shown(found)}")
    return found


def inside(name: Any, config: Path, *, folder: Path | None = None) -> str:
    """Return ``name`` if it is a file within the artifact's folder, on every system and through every link.

    ``folder`` is that of ``config``, which names the file, if no other is given. Raises BadArtifact for any other
    file. One that is missing is left to whoever opens it.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a file, found {shown(name)}")
    folder = config.parent if folder is None else folder
    outside = BadArtifact(
        f"{config} names the file {shown(name)}, which lies outside the artifact's folder. Copy what it needs "
        "into the folder, or build the model again."
    )
    # A build on one system is loaded on others, so its names are taken apart as Windows does, too.
    windows = PureWindowsPath(name)
    if windows.drive or windows.root or ".." in windows.parts or not windows.parts or "\0" in name:
        raise outside
    if not name.isprintable() or max(map(len, windows.parts)) > _MOST_NAME:
        raise BadArtifact(
            f"{config} names the file {shown(name)}; the names of files are at most {_MOST_NAME} characters that "
            "can be printed."
        )
    try:
        path = folder / name
        if not os.path.lexists(path):
            return name
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in _roots(folder)):
            raise outside
        if not stat.S_ISREG(real.stat().st_mode):
            raise BadArtifact(f"{config} names {shown(name)}, which is not a regular file.")
    except (OSError, ValueError, RuntimeError) as error:
        raise BadArtifact(f"{config} names the file {shown(name)}, which cannot be read: {error}.") from error
    return name


def _roots(folder: Path) -> list[Path]:
    """Return the folders that an artifact's files may really lie in: its own and, in the hub's cache, blobs."""
    real = folder.resolve()
    snapshots = [parent for parent in real.parents if parent.name == "snapshots"]
    return [real, *(parent.parent / "blobs" for parent in snapshots[:1])]


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, a file of an artifact. Raises BadArtifact if it holds none."""
    return read_object(path, limit=MOST_JSON_BYTES, error=BadArtifact)
