"""How long work says how far it has come."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far work has come, always in the thread that called for it."""

    def start(self, stage: str, total: int, unit: str, *, done: int = 0) -> None:
        """Begin ``stage``, such as "calibrating": ``total`` of ``unit`` ("layers"), of which ``done`` are done.

        ``total`` is 0 where it is not known.
        """

    def advance(self, count: int) -> None:
        """Count what has been done of the stage since the last call."""


class NullProgress:
    """Progress that nobody watches."""

    def start(self, stage: str, total: int, unit: str, *, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""
