"""The pages of the documentation, and what is written in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A page says what cannot be run here, and why, in a comment right before the block.
_FENCE = re.compile(
    r"(?:<!-- (?P<kind>not run|file): (?P<value>[^\n]*?) -->\n\s*)?"
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_CODE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None  # why it is not run
    file: str | None  # the name under which later blocks of the page find it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A Markdown file of the repository."""

    name: str  # relative to the repository, such as docs/build.md

    @cached_property
    def text(self) -> str:
        """Return what is in the file."""
        return (ROOT / self.name).read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        """Return the fenced blocks in order."""
        blocks = []
        for match in _FENCE.finditer(self.text):
            indent = len(match["indent"])
            code = "".join(line[indent:] for line in match["code"].splitlines(keepends=True))
            line = self.text.count("\n", 0, match.start("ticks")) + 1
            note = {match["kind"]: match["value"]}
            blocks.append(
                Block(self.name, line, match["language"], code, note.get("not run"), note.get("file"))
            )
        return blocks

    @cached_property
    def prose(self) -> str:
        """Return the page without its fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def links(self) -> list[str]:
        """Return the targets of links to other files and to headings."""
        return [target for target in _LINK.findall(self.prose) if not re.match(r"(https?|mailto):", target)]

    @property
    def inline(self) -> list[str]:
        """Return what is written as `code` within sentences and tables."""
        return [" ".join(code.split()) for code in _CODE.findall(self.prose)]

    @property
    def anchors(self) -> set[str]:
        """Return the anchors that the hub of the project makes of headings."""
        anchors: dict[str, int] = {}
        found = set()
        for heading in _HEADING.findall(self.prose):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            count = anchors.get(slug, 0)
            anchors[slug] = count + 1
            found.add(f"{slug}-{count}" if count else slug)
        return found


def pages(*others: str) -> list[Page]:
    """Return README.md, all of docs/, and those of ``others`` that exist."""
    names = [
        "README.md",
        *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
    ]
    return [Page(name) for name in [*names, *others] if (ROOT / name).is_file()]
