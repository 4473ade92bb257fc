"""Bars and status lines."""

from __future__ import annotations

import io

from rich.console import Console

from ortlm.cli.progress import Bars, StatusLine


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
