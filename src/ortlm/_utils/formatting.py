"""Numbers and texts for people."""

from __future__ import annotations

import os
import re

from ortlm.errors import BadOption

# Control characters but tab and newline, and those that change the direction or the line of the text after them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return ``text`` with its control characters written as JSON does: ``\u001b`` for escape.

    A terminal obeys them: they move the cursor, change its title or hide what follows. Tab and newline stay.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def system_error(error: OSError) -> str:
    """Return what the system refused, with the file if that is known: "/full/x: No space left on device"."""
    if error.filename is None or not error.strerror:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def one_line(found: object) -> str:
    """Return the text of an error or a name on one line, without control characters, cut to 2,000 characters."""
    text = printable(" ".join(str(found)[:4_000].split()))
    return text if len(text) <= 2_000 else f"{text[:2_000]}..."


def readable_bytes(count: float) -> str:
    """Return ``count`` bytes in powers of 1000, as disks are sold: "640.3 MB"."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if abs(count) < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def readable_count(number: int) -> str:
    """Return a number of parameters in millions or billions: "3.82 B"."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def parse_bytes(text: str, option: str) -> int:
    """Return the bytes that ``text`` says: "2.1GB", "700 MB", "4096". Raises BadOption naming ``option``."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kMG]i?B?|B)?\s*", text, flags=re.IGNORECASE)
    if not found:
        raise BadOption(f"{option} takes a size such as 2.1GB or 700MB; got {text!r}.")
    unit = (found[2] or "B").lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    return int(float(found[1]) * base ** " kmg".index(unit[0] if unit else " "))
