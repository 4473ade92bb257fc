"""The fields of protobuf messages by their numbers; what they mean, the caller knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Bytes(Protocol):
    """Bytes by their place; IndexError for a place after the last."""

    def __getitem__(self, at: int, /) -> int: ...


def fields(data: Bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of the message that lies between two places of ``data``.

    Those of bytes, texts and messages are number, beginning and end; those of a varint are number, value and -1;
    numbers of fixed size are passed over. Raises ValueError for what is no message.
    """
    try:
        while at < end:
            key = data[at]
            at += 1
            if key >= 0x80:
                key, at = _varint(data, at - 1)
                # Other readers look at 32 bits only.
                key &= 0xFFFFFFFF
            kind = key & 7
            if kind in (0, 2):
                value = data[at]
                at += 1
                if value >= 0x80:
                    value, at = _varint(data, at - 1)
                if kind == 0:
                    yield key >> 3, value, -1
                    continue
                if at + value > end:
                    raise ValueError("a field ends beyond its message")
                yield key >> 3, at, at + value
                at += value
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise ValueError(f"there is no wire type {kind}")
    except IndexError as error:
        raise ValueError("it ends early") from error
    if at != end:
        raise ValueError("a field ends beyond its message")


def varint(value: int) -> bytes:
    """Return a number that is not negative as protobuf writes it."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def packed_varints(data: Bytes, at: int, end: int) -> Iterator[int]:
    """Yield the numbers of a packed field. Raises ValueError for what is none."""
    try:
        while at < end:
            value, at = _varint(data, at)
            yield value
    except IndexError as error:
        raise ValueError("it ends early") from error


def field(number: int, content: bytes | int) -> bytes:
    """Return a field that holds bytes, or a number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def _varint(data: Bytes, at: int) -> tuple[int, int]:
    """Return a number, and the place after it."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number is too long")
