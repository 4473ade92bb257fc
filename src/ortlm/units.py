"""Numbers for people."""

from __future__ import annotations


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
