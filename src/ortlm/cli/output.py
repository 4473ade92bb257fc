"""Where everything that a command prints goes through, so that no stranger's text controls the terminal.

File names, error messages, chat templates, tokenizers and models all come from elsewhere; see ``units.printable``.
What a model generates is written as it is to files and pipes, which may want every byte, and made printable for a
terminal.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

from ortlm._utils.formatting import printable

if TYPE_CHECKING:
    from rich.console import Console


def set_up(*, verbose: bool) -> None:
    """Send log messages to stderr, and let terminals that cannot show a character get a replacement."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("ortlm").setLevel(logging.INFO if verbose else logging.WARNING)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def say(text: str = "") -> None:
    """Write a line of results to stdout."""
    print(printable(text), flush=True)


def tell(text: str, *, dim: bool = False) -> None:
    """Write a line that is no result to stderr; ``dim`` on a terminal."""
    if dim and sys.stderr.isatty():
        console(stderr=True).print(text, style="dim", highlight=False, markup=False)
    else:
        print(printable(text), file=sys.stderr, flush=True)


def write_generated(text: str) -> None:
    """Write text that a model generated to stdout."""
    if sys.stdout.isatty():
        text = printable(text.replace("\r\n", "\n"))
    sys.stdout.write(text)
    sys.stdout.flush()


def console(
    *,
    stderr: bool = False,
    quiet: bool = False,
    width: int | None = None,
    file: IO[str] | None = None,
    force_terminal: bool | None = None,
) -> Console:
    """Return a console of rich whose texts hold no control characters but rich's own, and no markup.

    It is ``width`` columns wide, by default as wide as the terminal. It writes to ``file``, by default stdout or
    stderr, which ``force_terminal`` takes for a terminal.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Printable(Console):
        """Escapes what renderables hold; ``print``, tables, progress bars and status lines all come by here."""

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(printable(segment.text), segment.style)

    return Printable(
        stderr=stderr,
        quiet=quiet,
        width=width,
        file=file,
        force_terminal=force_terminal,
        markup=False,
        emoji=False,
    )


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
