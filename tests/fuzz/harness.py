"""What the fuzz tests share: damaged JSON and bytes, and the rule that a door ends in an answer or an ortlm error.

A door is a function that reads what strangers wrote. Each has a file here, ``test_<door>.py``:

    @fuzz(damaged_json(VALID))
    def test_manifest(found):
        open_artifact(write(found))

In a normal run every door gets a few seconds and always the same examples. ``make fuzz`` loops over all of them,
with new seeds and longer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import signal
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ortlm.errors import Error

# None: the examples of a normal run, which are the same every time.
SEED = os.environ.get("FUZZ_SEED")
SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
EXAMPLES = 200 if SEED is None else 100_000
# No answer may take longer, on a busy machine either.
LONGEST_SECONDS = 60.0

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**63, -(2**63), 2**70, 10**400, 1e308,
    float("nan"), float("inf"), "", "x", "²", "0", "../x", "/etc/passwd", "C:\\x", "a\x00b", "\x1b[2J", "\ud800",
    "x" * 5_000, [], [[]], [None], [0], ["x"], {}, {"": None}, {"x": {}}, [1] * 1_000,
)  # fmt: skip


def fuzz(strategy: st.SearchStrategy[Any], *, allowed: tuple[type[BaseException], ...] = (Error,)) -> Any:
    """Return a decorator: the test gets an example as its last argument, and may end well or in ``allowed``.

    Fixtures come before it. One that takes longer than LONGEST_SECONDS fails.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        *fixtures, last = inspect.signature(test).parameters.values()

        @functools.wraps(test)
        def bounded(**given_fixtures: Any) -> None:
            began = time.monotonic()
            failed = False

            def run(example: Any) -> None:
                nonlocal failed
                # Hypothesis has a number of examples, but no limit of time. A failure is looked at to its end.
                if not failed and time.monotonic() - began > SECONDS:
                    raise unittest.SkipTest
                try:
                    with _at_most(LONGEST_SECONDS):
                        refused = _refusal(
                            functools.partial(test, **given_fixtures, **{last.name: example}), allowed
                        )
                    # What people read is one line.
                    assert refused is None or "\n" not in refused, f"several lines: {refused}"
                except BaseException:
                    failed = True
                    raise

            property_ = given(strategy)(run)
            limits = settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=SEED is None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            )
            # Hypothesis ends at once when a test is skipped, which is how the time ends here.
            with contextlib.suppress(unittest.SkipTest):
                limits(property_)()

        # pytest gives the fixtures only; the example is ours.
        bounded.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]
        return bounded

    return decorate


def _refusal(door: Callable[[], None], allowed: tuple[type[BaseException], ...]) -> str | None:
    """Return the message of the error of ortlm that ``door`` ends in, None if there is none."""
    try:
        door()
    except allowed as error:
        return str(error) if isinstance(error, Error) else None
    return None


def damaged_json(valid: Any) -> st.SearchStrategy[Any]:
    """Return copies of ``valid``, a value of JSON, in which one to three places were changed."""

    @st.composite
    def make(draw: st.DrawFn) -> Any:
        found = copy.deepcopy(valid)
        for _ in range(draw(st.integers(1, 3))):
            places = list(_places(found))
            if not places:
                break
            holder, key = draw(st.sampled_from(places))
            what = draw(st.sampled_from(("hostile", "drop", "near", "nest", "copy")))
            if what == "drop":
                del holder[key]
            elif what == "near":
                holder[key] = _near(draw, holder[key])
            elif what == "nest":
                for _ in range(draw(st.sampled_from((1, 50, 150)))):
                    holder[key] = [holder[key]]
            elif what == "copy":
                source, other = draw(st.sampled_from(places))
                if other in source if isinstance(source, dict) else other < len(source):
                    holder[key] = copy.deepcopy(source[other])
            else:
                holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        return found

    return make()


def damaged_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return copies of ``valid`` with bits flipped, bytes cut out, put in or repeated."""

    @st.composite
    def make(draw: st.DrawFn) -> bytes:
        found = bytearray(valid)
        for _ in range(draw(st.integers(1, 4))):
            # The beginning is where formats keep what matters.
            end = draw(st.sampled_from((min(64, len(found)), len(found))))
            at = draw(st.integers(0, max(0, end - 1)))
            what = draw(st.sampled_from(("flip", "set", "cut", "end", "insert", "repeat")))
            if what == "flip" and found:
                found[at] ^= 1 << draw(st.integers(0, 7))
            elif what == "set" and found:
                found[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B)))
            elif what == "cut":
                del found[at : at + draw(st.integers(1, 64))]
            elif what == "end":
                del found[at:]
            elif what == "insert":
                found[at:at] = draw(st.binary(min_size=1, max_size=16))
            elif what == "repeat":
                found[at:at] = found[at : at + draw(st.integers(1, 256))]
        return bytes(found)

    return make()


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    level = [found]
    while level:
        holder = level.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in list(keys)[:50]:
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                level.append(holder[key])


def _near(draw: st.DrawFn, value: Any) -> Any:
    """Return a value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        # Larger ones are no floats.
        as_float = float(value) if abs(value) < 10**300 else 0.5
        return draw(st.sampled_from((value - 1, value + 1, -value, value * 2, value * 1000, as_float)))
    if isinstance(value, float):
        return draw(st.sampled_from((-value, value * 1e6, 0.0, 1e-320, str(value))))
    if isinstance(value, str):
        return draw(st.sampled_from((value[:-1], value + "x", value.upper(), value * 100, value + "\n")))
    return [value]


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer; only where signals can say so."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
