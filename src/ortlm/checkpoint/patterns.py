"""Regular expressions of strangers, as adapters hold them: only those whose work is bounded.

peft matches a module's name with ``rank_pattern`` and ``alpha_pattern``. What people write there are ends of names
and numbers of layers. Python's matching rewinds and tries again, so that some expressions never come to an end;
the steps that one can take are counted here before it is used.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

_LONGEST_PATTERN = 1000
_LONGEST_NAME = 500
# About a second.
_MOST_STEPS = 30_000_000
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


class Unbounded(ValueError):
    """An expression that is none, or that may take too long; the text says why."""


def matches(pattern: str, name: str) -> bool:
    """Whether ``name``, or an end of it after a dot, is what ``pattern`` says, as in peft.

    Raises Unbounded.
    """
    if _PLAIN.fullmatch(pattern) and (name == pattern or name.endswith(f".{pattern}")):
        _check_length(pattern, name)
        return True
    return _applied(pattern, name, lambda: re.fullmatch(rf"(.*\.)?({pattern})", name))


def starts(pattern: str, name: str) -> bool:
    """Whether ``name`` begins with what ``pattern`` says, as in compressed-tensors.

    Raises Unbounded.
    """
    return _applied(pattern, name, lambda: re.match(pattern, name))


def _applied(pattern: str, name: str, match: Callable[[], re.Match[str] | None]) -> bool:
    _check_length(pattern, name)
    try:
        # What a later Python may read in another way (nested sets) means here what it means to peft.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = _steps(_parsed(pattern), len(name) + 1)
            if steps * (len(name) + 1) > _MOST_STEPS:
                raise Unbounded("matching it may take too long")
            return match() is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise Unbounded(str(error) or type(error).__name__) from error


def _check_length(pattern: str, name: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise Unbounded(f"it has {len(pattern):,} characters, at most {_LONGEST_PATTERN:,} are allowed")
    if len(name) > _LONGEST_NAME:
        raise Unbounded(f"the name of a module has {len(name):,} characters")


def _parsed(pattern: str) -> Any:
    # The standard library's own, under the name that it has in each version.
    for module in ("re._parser", "sre_parse"):
        try:
            return importlib.import_module(module).parse(pattern)
        except ModuleNotFoundError:
            continue
    raise Unbounded("this Python cannot take expressions apart")


def _steps(items: Iterable[Any], length: int) -> int:
    """Return at most how many ways there are to match ``items`` from one place of a text of ``length``."""
    total = 1
    for kind, value in items:
        name = str(kind)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "RANGE", "CATEGORY"):
            continue
        if name == "BRANCH":
            total *= sum(_steps(branch, length) for branch in value[1])
        elif name == "SUBPATTERN":
            total *= _steps(value[-1], length)
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inner = value
            ways = _steps(inner, length)
            if int(most) <= 1:
                total *= 1 + ways
            elif ways > 1:
                raise Unbounded("it repeats what has several ways to match")
            else:
                total *= min(int(most), length) + 1
        else:
            raise Unbounded(f"it uses {name.lower().replace('_', ' ')}, which is not supported")
        if total > _MOST_STEPS:
            raise Unbounded("matching it may take too long")
    return total
