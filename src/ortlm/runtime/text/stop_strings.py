"""Stop texts: found across token boundaries, and never shown even in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Lets text through until one of ``texts`` occurs.

    The end of the text is held back for as long as it could be the beginning of a stop text.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Take the next piece and return what can be shown now. Nothing comes after a stop text."""
        if self.found is not None:
            return ""
        if not self._texts:
            return piece
        text = self._held + piece
        # The one that ends first, whatever pieces the text comes in.
        hits = [(at + len(stop), at, stop) for stop in self._texts if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._texts)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back; call it when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
