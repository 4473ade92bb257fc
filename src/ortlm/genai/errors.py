"""The one error of this package: programs for the official runtime catch RuntimeError."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ortlm.errors import Error

P = ParamSpec("P")
R = TypeVar("R")


class GenaiError(Error, RuntimeError):
    """Anything that goes wrong here; ``__cause__`` is ortlm's own error, if it came from below."""


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
