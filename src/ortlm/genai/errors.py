"""The one error of this package: programs for the official runtime catch RuntimeError."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ortlm.errors import Error

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class GenaiError(Error, RuntimeError):
    """Anything that goes wrong here; ``__cause__`` is ortlm's own error, if it came from below."""


class GenaiTypeError(GenaiError, TypeError):
    """An argument of another kind, which is a TypeError in the official runtime."""


def text(value: object, what: str) -> str:
    """Return ``value`` if it is text. Raises GenaiTypeError."""
    if not isinstance(value, str):
        raise GenaiTypeError(f"{what} must be text, found {type(value).__name__}.")
    return value


def whole(value: Any, what: str) -> int:
    """Return ``value`` as a number if it is a whole one. Raises GenaiTypeError."""
    try:
        return operator.index(value)
    except TypeError:
        raise GenaiTypeError(f"{what} must be a whole number, found {value!r}.") from None


def instance(value: object, kind: type[T], what: str) -> T:
    """Return ``value`` if it is a ``kind``. Raises GenaiTypeError."""
    if not isinstance(value, kind):
        raise GenaiTypeError(f"{what} must be a {kind.__name__}, found {type(value).__name__}.")
    return value


def official(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` with every error of ortlm raised as GenaiError."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except GenaiError:
            raise
        except Error as error:
            raise GenaiError(str(error)) from error

    return call
