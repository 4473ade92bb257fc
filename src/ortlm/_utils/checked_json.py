"""JSON that strangers wrote, checked once: where it is read, what it may hold, and in which ranges.

    found = read_object(path, limit=1 << 20, error=BadArtifact)
    values = check(found, {"layers": integer(1, 10_000), "name": text(default="")}, file=path, error=BadArtifact)

What is refused is told in one line with the file and the key, as the class of error that the caller names. Nobody
else parses such files, so that there is one answer to what a number, a null or a name given twice means:

- a null is as if the key were absent;
- a whole number beyond 64 bits becomes a float, which no field for whole numbers takes; infinities and NaN are
  refused;
- a name that an object gives twice with different values is refused, since readers disagree which one counts.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard

from ortlm._utils.formatting import printable
from ortlm.errors import Error, nearest

# Nothing that people write nests deeper, and code that follows a value down may recurse this far.
MOST_DEPTH = 100
MOST_INTEGER = 2**63 - 1
_CHUNK_BYTES = 1 << 20
_SHOWN_CHARACTERS, _SHOWN_ENTRIES = 60, 15


class _Missing(Enum):
    KEY = "missing"


REQUIRED: Final = _Missing.KEY


# --- files and texts ------------------------------------------------------------------------------------


def read_bytes(path: str | Path, *, limit: int, error: type[Error]) -> bytes:
    """Return what the regular file ``path`` holds, at most ``limit`` bytes.

    Raises ``error`` for anything else than a regular file (a pipe or a device never ends), for more bytes, and
    for what the system refuses.
    """
    try:
        # Not to wait for a writer, if this is a pipe.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb", buffering=0) as file:
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
            found = _first_bytes(file, limit + 1) if regular else b""
    except (OSError, ValueError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else failure
        raise error(f"{path} cannot be read: {reason}.") from failure
    if not regular:
        raise error(f"{path} is not a regular file.")
    if len(found) > limit:
        raise error(f"{path} has more than {limit:,} bytes, which is the limit for such a file.")
    return found


def _first_bytes(file: io.RawIOBase, most: int) -> bytes:
    parts: list[bytes] = []
    while most and (part := file.read(min(_CHUNK_BYTES, most))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def read_text(path: str | Path, *, limit: int, error: type[Error]) -> str:
    """Return the UTF-8 text in the regular file ``path``, at most ``limit`` bytes; ``error`` for anything else."""
    raw = read_bytes(path, limit=limit, error=error)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path} is not UTF-8: byte {failure.start} is {raw[failure.start]:#04x}.") from failure


def parse(content: str, *, where: object, error: type[Error]) -> Any:
    """Return the value that the JSON ``content`` says; ``where`` names it in messages.

    Raises ``error`` for what is no JSON, for nesting deeper than MOST_DEPTH, for numbers that no float holds, and
    for names that an object gives twice.
    """
    try:
        return loads(content)
    except ValueError as failure:
        raise error(f"{where} cannot be read as JSON: {failure}.") from failure


def loads(content: str) -> Any:
    """Return the value that the JSON ``content`` says; ``ValueError``, with a reason, where ``parse`` raises."""
    try:
        found = json.loads(content, parse_int=_parsed_integer, object_pairs_hook=_parsed_object)
        _check_values(found)
    except RecursionError as failure:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH}") from failure
    except MemoryError as failure:
        raise ValueError("there is not enough memory for it") from failure
    except ValueError as failure:
        raise ValueError(printable(str(failure))) from failure
    return found


def parse_object(content: str, *, where: object, error: type[Error]) -> dict[str, Any]:
    """Return the object that the JSON ``content`` holds; see ``parse``."""
    found = parse(content, where=where, error=error)
    if not isinstance(found, dict):
        raise error(f"{where} must hold a JSON object, found {shown(found)}.")
    return found


def read_object(path: str | Path, *, limit: int, error: type[Error]) -> dict[str, Any]:
    """Return the JSON object in the regular file ``path``; see ``read_text`` and ``parse``."""
    return parse_object(read_text(path, limit=limit, error=error), where=path, error=error)


def shown(value: Any) -> str:
    """Return ``value`` as a message shows it: short, on one line, without control characters."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, int) and abs(value) > 10**_SHOWN_CHARACTERS:
        return f"a whole number of {value.bit_length():,} bits"
    if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS:
        # Not to write out, only to cut, what may be long.
        start = printable(repr(value[:_SHOWN_CHARACTERS]))[: _SHOWN_CHARACTERS - 10]
        return f"{start}... ({len(value):,} characters)"
    if isinstance(value, list) and len(value) > _SHOWN_ENTRIES:
        return f"{shown(value[:_SHOWN_ENTRIES]).removesuffix('...')}... ({len(value):,} entries)"
    try:
        text = printable(repr(value))
    except ValueError:  # Python writes no numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 10]}..."


def _parsed_integer(digits: str) -> int | float:
    value = int(digits)
    if -MOST_INTEGER - 1 <= value <= MOST_INTEGER:
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"the number {digits[:20]}... is too large") from None


def _parsed_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and (type(seen[key]) is not type(value) or seen[key] != value):
                raise ValueError(f"{shown(key)} is given twice, with different values")
            seen[key] = value
    return found


def _check_values(found: Any) -> None:
    """Raise ``RecursionError`` for values nested too deeply, ``ValueError`` for numbers that are not finite."""
    level = [found]
    for _ in range(MOST_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"it holds {value}, which is no finite number")
        if not inner:
            return
        level = inner
    raise RecursionError


# --- fields ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """What the value of a key may be: ``good`` says whether it fits, ``expected`` how a message calls it.

    ``default`` is the value of a key that is absent or null. ``table`` and ``item`` are what an object or a list
    holds; see ``check``.
    """

    good: Callable[[Any], bool]
    expected: str
    default: Any = REQUIRED
    item: Field | None = None
    table: Mapping[str, Field] | None = None
    unknown: Literal["keep", "drop", "refuse"] = "drop"


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether ``value`` is a whole number and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether ``value`` is a finite number that a float holds, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def integer(least: int = 0, most: int = MOST_INTEGER, *, default: Any = REQUIRED) -> Field:
    """Return the field of a whole number from ``least`` to ``most``."""
    return Field(
        lambda v: is_integer(v) and least <= v <= most, _range("a whole number", least, most), default
    )


def number(least: float = -math.inf, most: float = math.inf, *, default: Any = REQUIRED) -> Field:
    """Return the field of a finite number from ``least`` to ``most``."""
    return Field(lambda v: is_number(v) and least <= v <= most, _range("a number", least, most), default)


def flag(*, default: Any = REQUIRED) -> Field:
    """Return the field of true or false."""
    return Field(lambda v: isinstance(v, bool), "true or false", default)


def text(*, longest: int = 1 << 16, default: Any = REQUIRED) -> Field:
    """Return the field of a string of at most ``longest`` characters."""
    return Field(
        lambda v: isinstance(v, str) and len(v) <= longest,
        f"a string of at most {longest:,} characters",
        default,
    )


def one_of(*allowed: Any, default: Any = REQUIRED) -> Field:
    """Return the field of one of the values ``allowed``, of the same type."""
    words = ", ".join(json.dumps(value) for value in allowed)
    return Field(
        lambda v: any(type(v) is type(other) and v == other for other in allowed), f"one of {words}", default
    )


def list_of(item: Field, *, least: int = 0, most: int = 1 << 20, default: Any = REQUIRED) -> Field:
    """Return the field of a list with ``least`` to ``most`` entries, each as ``item`` says."""
    return Field(
        lambda v: isinstance(v, list) and least <= len(v) <= most,
        _range("a list, with entries", least, most),
        default,
        item,
    )


def object_of(item: Field, *, most: int = 1 << 16, default: Any = REQUIRED) -> Field:
    """Return the field of an object with any names, at most ``most``, each value as ``item`` says."""
    return Field(
        lambda v: isinstance(v, dict) and len(v) <= most, f"an object of at most {most:,} keys", default, item
    )


def table(
    fields: Mapping[str, Field],
    *,
    unknown: Literal["keep", "drop", "refuse"] = "drop",
    default: Any = REQUIRED,
) -> Field:
    """Return the field of an object whose values ``fields`` name; ``unknown`` says what happens to other keys."""
    return Field(lambda v: isinstance(v, dict), "an object", default, table=fields, unknown=unknown)


def anything(*, default: Any = REQUIRED) -> Field:
    """Return the field of any value."""
    return Field(lambda v: True, "a value", default)


def check(
    found: Mapping[str, Any],
    fields: Mapping[str, Field],
    *,
    file: object,
    error: type[Error],
    at: str = "",
    unknown: Literal["keep", "drop", "refuse"] = "drop",
) -> dict[str, Any]:
    """Return a value for every key of ``fields``: that of ``found``, or the default where it is absent or null.

    ``unknown`` keys of ``found`` are kept as they are, dropped, or refused. ``at`` is where in ``file`` the object
    stands. Raises ``error`` with file, key, what was found and what is expected.
    """
    if unknown == "refuse":
        for key in found:
            if key not in fields:
                raise error(
                    f"{file}: {place(at, key)} is not allowed here. Allowed: {', '.join(fields)}."
                    + nearest(key, fields)
                )
    out = dict(found) if unknown == "keep" else {}
    for key, wanted in fields.items():
        out[key] = check_value(found.get(key), wanted, file=file, error=error, at=place(at, key))
    return out


def check_value(value: Any, wanted: Field, *, file: object, error: type[Error], at: str) -> Any:
    """Return ``value``, which stands ``at`` a place in ``file``, checked as ``wanted`` says; see ``check``."""
    if value is None:
        if wanted.default is REQUIRED:
            raise error(f"{file}: {at} is missing, expected {wanted.expected}.")
        return wanted.default
    if not wanted.good(value):
        raise error(f"{file}: {at} is {shown(value)}, expected {wanted.expected}.")
    if wanted.table is not None:
        return check(value, wanted.table, file=file, error=error, at=at, unknown=wanted.unknown)
    if wanted.item is None:
        return value
    if isinstance(value, dict):
        return {
            key: check_value(v, wanted.item, file=file, error=error, at=place(at, key))
            for key, v in value.items()
        }
    return [check_value(v, wanted.item, file=file, error=error, at=f"{at}[{i}]") for i, v in enumerate(value)]


def place(at: str, key: str) -> str:
    """Return how messages name the key ``key`` of the object that stands ``at`` a place."""
    key = shown(key)[1:-1]
    return f"{at}.{key}" if at else key


def _range(what: str, least: float, most: float) -> str:
    if least == -math.inf and most == math.inf:
        return what
    if most in (math.inf, MOST_INTEGER):
        return f"{what} of at least {least:,}"
    if least == -math.inf:
        return f"{what} of at most {most:,}"
    return f"{what} from {least:,} to {most:,}"
