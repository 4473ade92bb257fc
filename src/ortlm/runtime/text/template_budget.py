"""What one rendering of a chat template may spend: steps, time, and bytes.

Every value that a template makes is weighed: its size with everything inside written out. A list that holds the
same list twice weighs twice as much, so writing, comparing or hashing a value costs no more than its weight.
"""

from __future__ import annotations

import sys
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2

from ortlm._utils.formatting import readable_bytes

SECONDS = 5.0
MOST_DEPTH = 200
MOST_BITS = 1 << 16
CONTAINERS = (list, tuple, dict, set, frozenset)
_STEPS = 10_000_000
# In addition, so many times the weight of the messages: a long conversation may take more than a short one.
_BYTES, _BYTES_FACTOR = 128 << 20, 64
_VALUE, _VALUE_FACTOR = 32 << 20, 16
_VIEWS = (KeysView, ItemsView, ValuesView)


class TemplateLimit(jinja2.TemplateError):
    """A template asked for more steps, time or memory than it may have."""


class Budget:
    """What one rendering may still spend; ``inputs`` are the values that it is given."""

    def __init__(self, inputs: Iterable[Any], seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._steps = _STEPS
        self._calls = 0
        self._bytes = sys.maxsize
        self._most = sys.maxsize
        # By identity; the values are held, because an address is given away again.
        self._known: dict[int, tuple[Any, int, int]] = {}
        given = sum(self.weigh(value) for value in inputs)
        self._bytes = _BYTES + _BYTES_FACTOR * given
        self._most = _VALUE + _VALUE_FACTOR * given

    def step(self, count: int = 1) -> None:
        """Spend ``count`` steps."""
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimit(f"it takes more than {_STEPS:,} steps")
        if time.monotonic() > self._end:
            raise TemplateLimit(f"it takes longer than {self._seconds:g} s")

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Refuse calls that go deeper than any template's; Python's own limit may have been raised."""
        self._calls += 1
        try:
            if self._calls > MOST_DEPTH:
                raise TemplateLimit(f"its calls go deeper than {MOST_DEPTH}")
            yield
        finally:
            self._calls -= 1

    def room(self, size: int | float) -> None:
        """Refuse a value of ``size`` bytes if it is larger than any may be."""
        if size > self._most:
            raise TemplateLimit(f"it makes a value of more than {readable_bytes(self._most)}")

    def charge(self, value: Any) -> Any:
        """Return ``value``, which was just made, after charging its bytes."""
        if isinstance(value, (str, bytes)):
            size = sys.getsizeof(value)
            self.room(size)
            self._spend(size)
        elif isinstance(value, CONTAINERS):
            if id(value) not in self._known:
                self._spend(sys.getsizeof(value))
            self.room(self.weigh(value))
        elif isinstance(value, int):
            if value.bit_length() > MOST_BITS:
                raise TemplateLimit(f"it makes a number of more than {MOST_BITS} bits")
        else:
            self.weigh(value)
        return value

    def _spend(self, size: int) -> None:
        self._bytes -= size
        if self._bytes < 0:
            raise TemplateLimit("it makes more text than the messages can need")

    def weigh(self, value: Any) -> int:
        """Return the bytes of ``value`` and all that it holds, as if nothing in it were shared."""
        return self._weigh(value)[0]

    def depth(self, value: Any) -> int:
        """Return how many containers lie within each other in ``value``."""
        return self._weigh(value)[1]

    def _weigh(self, value: Any, level: int = 0) -> tuple[int, int]:
        if isinstance(value, (str, bytes)):
            return sys.getsizeof(value), 0
        if isinstance(value, _VIEWS):
            found = self._weigh(getattr(value, "mapping", ()), level)
            return found[0] * 2, found[1] + 2
        if not isinstance(value, CONTAINERS):
            return 32, 0
        known = self._known.get(id(value))
        if known is not None:
            return known[1], known[2]
        if level > MOST_DEPTH:
            raise TemplateLimit(f"it nests values deeper than {MOST_DEPTH}")
        self.step(len(value))
        weight, depth = sys.getsizeof(value), 0
        items: Iterable[Any] = value
        if isinstance(value, dict):
            items = (part for pair in value.items() for part in pair)
        for item in items:
            more, below = self._weigh(item, level + 1)
            weight += more
            depth = max(depth, below)
        depth += 1
        if depth > MOST_DEPTH:
            raise TemplateLimit(f"it nests values deeper than {MOST_DEPTH}")
        self.room(weight)
        self._known[id(value)] = (value, weight, depth)
        return weight, depth

    def listed(self, value: Any) -> Any:
        """Return ``value``, as a list if it is an iterator whose length nobody knows."""
        if isinstance(value, Iterator):
            return self.charge(list(Counted(value, self)))
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """Return ``pieces`` as one text."""
        kept, size = [], 0
        for piece in pieces:
            size += len(piece)
            self.room(size)
            kept.append(piece)
        self.step(len(kept) // 16)
        found: str = self.charge("".join(kept))
        return found


BUDGET: ContextVar[Budget] = ContextVar("ortlm_template_budget")


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Let what is rendered inside draw on ``budget``."""
    token = BUDGET.set(budget)
    try:
        yield
    finally:
        BUDGET.reset(token)


class Counted:
    """An iterable, each of whose items is a step."""

    __slots__ = ("_budget", "_value")

    def __init__(self, value: Any, budget: Budget) -> None:
        self._value, self._budget = value, budget

    def __iter__(self) -> Iterator[Any]:
        step = self._budget.step
        for item in self._value:
            step()
            yield item

    def __len__(self) -> int:
        return len(self._value)
