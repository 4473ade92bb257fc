"""All slots are busy, the longest prompts come first, and memory is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("pydantic")

from ortlm.batch.answering import Answerer, Result
from ortlm.batch.rows import Row
from ortlm.batch.scheduling import Window, answer_all
from ortlm.errors import Overloaded, ShutDown
from ortlm.server.errors import ApiError
from ortlm.server.models import Models


def row(number: int, size: int) -> Row:
    return Row(number, number + 1, b"x" * size)


def popped(window: Window) -> Iterator[int]:
    while (found := window.pop()) is not None:
        yield found.number


def test_longest_first_within_a_window() -> None:
    sizes = [5, 9, 1, 7, 3, 8, 2]
    rows = [row(number, size) for number, size in enumerate(sizes)]
    assert list(popped(Window(rows, most=100))) == [1, 5, 3, 0, 4, 6, 2]
    assert list(popped(Window(rows, most=1))) == list(range(7))
    assert list(popped(Window(rows, most=3))) == [1, 3, 0, 5, 4, 6, 2]


def test_a_window_is_bounded_by_rows_and_bytes() -> None:
    taken = []

    def rows() -> Iterator[Row]:
        for number in range(1000):
            taken.append(number)
            yield row(number, 10)

    window = Window(rows(), most=8)
    window.pop()
    assert len(taken) == 8
    taken.clear()
    window = Window(rows(), most=100, most_bytes=35)
    window.pop()
    assert len(taken) == 4
    assert sum(1 for _ in popped(window)) == 999


class Slow:
    """Answers after a moment, and notes how many are under way."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def answer(self, row: Row) -> Result:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        return Result(row.number, {}, failed=False)


def test_every_row_once_and_all_slots_busy() -> None:
    slow: Any = Slow()
    found: list[int] = []
    rows = (row(number, number % 7) for number in range(100))
    asyncio.run(answer_all(slow, rows, lambda result: found.append(result.number), at_once=6, window=16))
    assert sorted(found) == list(range(100))
    assert slow.most == 6


def test_what_put_raises_ends_all() -> None:
    slow: Any = Slow()

    def full(result: Result) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        asyncio.run(answer_all(slow, (row(n, 1) for n in range(50)), full, at_once=6))


class Failing(Answerer):
    """Fails ``times`` times with ``error``."""

    def __init__(self, error: Exception, times: int, *, retries: int = 2) -> None:
        super().__init__(Models([]), retries=retries)
        self._error, self._times = error, times

    async def _whole(self, kind: Any, value: Any) -> dict[str, Any]:
        if self._times:
            self._times -= 1
            raise self._error
        return {"usage": {"prompt_tokens": 5, "completion_tokens": 7}}


ASKED = Row(0, 1, b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}')


@pytest.mark.parametrize(
    ("error", "times", "status", "retries"),
    [
        (ShutDown("x"), 2, 200, 2),
        (ShutDown("x"), 3, 503, 2),
        (RuntimeError("x"), 1, 200, 1),
        (RuntimeError("x"), 9, 500, 2),
        (ApiError(400, "no"), 9, 400, 0),
        (Overloaded("x"), 9, 429, 0),
    ],
)
def test_retries_are_bounded_and_counted(error: Exception, times: int, status: int, retries: int) -> None:
    found = asyncio.run(Failing(error, times).answer(ASKED))
    assert (found.value["response"]["status_code"], found.retries) == (status, retries)
    assert found.failed is (status != 200)
    assert found.new_tokens == (7 if status == 200 else 0)
