"""Which row is answered when: all slots are busy, and the longest prompts of a window come first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable

from ortlm.batch.answering import Answerer, Result
from ortlm.batch.rows import Row

# Rows that are in memory before they are answered, at most.
WINDOW_ROWS, WINDOW_BYTES = 1024, 64 << 20


class Window:
    """The next of ``rows``, of which ``pop`` gives the longest: the last are short, so few slots wait.

    Rows of like length also are next to each other, as those are that share a long beginning, which the engine
    computes once.
    """

    def __init__(
        self, rows: Iterable[Row], *, most: int = WINDOW_ROWS, most_bytes: int = WINDOW_BYTES
    ) -> None:
        self._rows = iter(rows)
        self._most, self._most_bytes = most, most_bytes
        self._heap: list[tuple[int, int, Row]] = []
        self._bytes = 0

    def pop(self) -> Row | None:
        """Return the longest row of the window, None if there is no more."""
        while len(self._heap) < self._most and (not self._heap or self._bytes < self._most_bytes):
            row = next(self._rows, None)
            if row is None:
                break
            size = len(row.text or b"")
            self._bytes += size
            heapq.heappush(self._heap, (-size, row.number, row))
        if not self._heap:
            return None
        size, _, row = heapq.heappop(self._heap)
        self._bytes += size
        return row


async def answer_all(
    answerer: Answerer,
    rows: Iterable[Row],
    put: Callable[[Result], None],
    *,
    at_once: int,
    window: int = WINDOW_ROWS,
) -> None:
    """Answer ``rows``, at most ``at_once`` of them at a time, and ``put`` each result as soon as it is there.

    Raises what ``put`` and ``answerer`` raise; what was under way is cancelled then.
    """
    waiting = Window(rows, most=window)
    tasks: set[asyncio.Task[Result]] = set()
    more = True
    try:
        while True:
            while more and len(tasks) < at_once:
                row = waiting.pop()
                if row is None:
                    more = False
                else:
                    tasks.add(asyncio.create_task(answerer.answer(row)))
            if not tasks:
                return
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: task.result().number):
                put(task.result())
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
