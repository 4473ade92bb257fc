"""Calls into the tokenizer library, whose panics are no exceptions of the usual kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ortlm.errors import Error


@contextmanager
def guarded(what: str, error: type[Error]) -> Iterator[None]:
    """Turn whatever the library raises into ``error``; ``what`` begins the message."""
    try:
        yield
    except BaseException as failure:
        raise as_error(failure, what, error) from failure


def as_error(failure: BaseException, what: str, error: type[Error]) -> Error:
    """Return ``failure`` as ``error``; errors of ours, and what asks the process to end, are raised again.

    A panic of Rust code arrives as a ``BaseException``, which ``except Exception`` lets through.
    """
    if isinstance(failure, (KeyboardInterrupt, SystemExit, GeneratorExit, Error)):
        raise failure
    if isinstance(failure, MemoryError):
        return error(f"{what}: it takes more memory than there is.")
    reason = " ".join(str(failure).split())[:300] or type(failure).__name__
    return error(f"{what}: {reason}")
