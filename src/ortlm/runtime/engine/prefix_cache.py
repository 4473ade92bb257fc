"""Caches of finished generations, kept for calls that begin with the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.token_ids import common_prefix_length


class PrefixCaches:
    """At most ``limit`` decode loops of one row, each with the adapter that it was computed with.

    May be used by several threads, and has no lock: a stream that nobody holds ends while memory is collected, in
    the middle of anything, and a lock that its own thread holds would never open.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[tuple[str | None, Loop]] = []

    def take(self, ids: Sequence[int], adapter: str | None) -> Loop | None:
        """Return the loop that agrees most with ``ids``, which is kept no longer; None if there is none."""
        while fitting := [kept for kept in tuple(self._kept) if kept[0] == adapter]:
            best = max(fitting, key=lambda kept: common_prefix_length(kept[1].history[0], ids))
            # Another thread may have taken it meanwhile.
            with contextlib.suppress(ValueError):
                self._kept.remove(best)
                return best[1]
        return None

    def keep(self, adapter: str | None, loop: Loop) -> None:
        """Keep ``loop``, and forget the oldest beyond the limit."""
        self._kept.append((adapter, loop))
        while len(self._kept) > self._limit:
            with contextlib.suppress(IndexError):
                self._kept.pop(0)

    def latest(self, adapter: str | None) -> Loop | None:
        """Return the loop that was kept last for ``adapter``, and continue keeping it."""
        return next((loop for name, loop in reversed(tuple(self._kept)) if name == adapter), None)

    def forget(self, adapter: str) -> None:
        """Forget the loops of ``adapter``."""
        self._kept = [kept for kept in self._kept if kept[0] != adapter]
