"""Progress on a terminal: bars for a build, one line for an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from ortlm._utils.formatting import readable_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task
    from rich.status import Status


class Pace:
    """How long a stage still takes if what is left takes as long as what has been done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.start(0, 0)

    def start(self, total: int, done: int) -> None:
        """Begin a stage of ``total``, of which ``done`` were done before."""
        self._began = self._last = self._clock()
        self._done, self._left = 0, total - done

    def advance(self, count: int) -> None:
        """Count what has been done since the last call."""
        self._last = self._clock()
        self._done += count
        self._left -= count

    def left(self) -> str:
        """Return the time left as hours, minutes and seconds, dashes while nothing has been done."""
        if not self._done:
            return "-:--:--"
        seconds = (self._last - self._began) / self._done * max(0, self._left)
        # What is under way counts, too, but never for more than all that is left.
        seconds = max(0.0, seconds - (self._clock() - self._last))
        return str(timedelta(seconds=round(seconds)))


class Bars:
    """A rich progress bar for each stage, as ``Progress``; nothing where ``console`` is not a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        pace = self._pace = Pace()

        class TimeLeft(TimeRemainingColumn):
            # Its own estimate is of the last half minute, in which no layer of a large model may end.
            def render(self, task: Task) -> Text:
                left = "0:00:00" if task.finished else pace.left()
                return Text(left, style="progress.remaining")

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[amount]}"),
            TextColumn("left"),
            TimeLeft(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._total = self._done = 0
        self._unit = self._note = ""
        self._closed = False

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars away."""
        if not self._closed:
            self._closed = True
            self._bars.stop()

    def start(self, stage: str, total: int, unit: str, *, done: int = 0) -> None:
        """Show a bar for what comes next."""
        self._unit, self._total, self._done = unit, total, done
        self._pace.start(total, done)
        self._task = self._bars.add_task(stage, total=total or None, completed=done, amount=self._amount())

    def advance(self, count: int) -> None:
        """Move that bar."""
        self._done += count
        self._pace.advance(count)
        self._bars.update(self._task, advance=count, amount=self._amount())

    def note(self, text: str) -> None:
        """Show ``text`` after the amount, such as a speed."""
        self._note = f", {text}" if text else ""

    def _amount(self) -> str:
        if self._unit == "bytes":
            return f"{readable_bytes(self._done)} of {readable_bytes(self._total)}"
        return f"{self._done:,}/{self._total:,} {self._unit}{self._note}"


class StatusLine:
    """A rich status line that names the stage and how much of it is done, as ``Progress``."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._stage = self._unit = ""
        self._total = self._done = 0

    def start(self, stage: str, total: int, unit: str, *, done: int = 0) -> None:
        """Show the stage."""
        self._stage, self._unit, self._total, self._done = stage, unit, total, done
        self._show()

    def advance(self, count: int) -> None:
        """Show how much of it is done."""
        self._done += count
        self._show()

    def _show(self) -> None:
        amount = f"{self._done:,} of {self._total:,}" if self._total else f"{self._done:,}"
        self._status.update(f"{self._stage}: {amount} {self._unit}" if self._done else self._stage)
