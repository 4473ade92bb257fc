"""JSON of an artifact, read with types: a value of another kind is an error that is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ortlm.checked_json import read_object
from ortlm.errors import BadArtifact

# Of a model with 10,000 layers and 100 adapters it is a third of that.
MOST_JSON_BYTES = 16 << 20

# What reading a value of another type than expected may raise.
WRONG = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def mapping(found: Any) -> dict[str, Any]:
    """Return an object of JSON, empty for null; ``TypeError`` for anything else."""
    if found is not None and not isinstance(found, dict):
        raise TypeError(f"expected an object, found {found!r}")
    return found or {}


def names(found: Any) -> dict[str, str]:
    """Return names of tensors by role; ``TypeError`` for anything else."""
    given = mapping(found)
    for role, name in given.items():
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a tensor for {role!r}, found {name!r}")
    return given


def integer(found: Any) -> int:
    """Return a whole number; ``TypeError`` for anything else."""
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"expected a whole number, found {found!r}")
    return found


def integer_or_none(found: Any) -> int | None:
    """Return a whole number, or None for null; ``TypeError`` for anything else."""
    return None if found is None else integer(found)


def inside(name: str, config: Path) -> str:
    """Return ``name`` if it stays within the artifact's folder."""
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a file, found {name!r}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadArtifact(f"{config} names the file {name!r}, which lies outside the artifact's folder.")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, a file of an artifact. Raises BadArtifact if it holds none."""
    return read_object(path, limit=MOST_JSON_BYTES, error=BadArtifact)
