"""Bars and status lines."""

from __future__ import annotations

import io

from rich.console import Console

from ortlm.cli.progress import Bars, Pace, StatusLine


class Status:
    """Keeps what a status line shows."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, text: str) -> None:
        self.texts.append(text)


def test_bars_show_sizes_and_counts() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Bars(console) as bars:
        bars.start("writing", 4_000_000, "bytes")
        bars.advance(1_000_000)
        assert bars._bars.tasks[0].fields["amount"] == "1.0 MB of 4.0 MB"
        bars.start("calibrating", 1200, "layers", done=1000)
        bars.advance(100)
        assert bars._bars.tasks[1].fields["amount"] == "1,100/1,200 layers"
        assert (bars._bars.tasks[1].completed, bars._bars.tasks[1].total) == (1100, 1200)


def test_a_status_line_counts() -> None:
    status = Status()
    line = StatusLine(status)  # type: ignore[arg-type]
    line.start("comparing", 3, "chunks")
    line.advance(1)
    line.start("answering prompts", 0, "rounds")
    line.advance(2)
    assert status.texts == [
        "comparing",
        "comparing: 1 of 3 chunks",
        "answering prompts",
        "answering prompts: 2 rounds",
    ]


def test_time_left_is_known_after_the_first_layer() -> None:
    now = 100.0
    pace = Pace(lambda: now)
    pace.start(32, 2)
    assert pace.left() == "-:--:--"
    now = 160.0
    assert pace.left() == "-:--:--"
    pace.advance(1)
    assert pace.left() == "0:29:00"
    # It counts down while the next one takes longer than the window of other estimates.
    now = 205.0
    assert pace.left() == "0:28:15"
    now = 220.0
    pace.advance(1)
    assert pace.left() == "0:28:00"
    now = 1e6
    assert pace.left() == "0:00:00"
    pace.start(4, 0)
    assert pace.left() == "-:--:--"
