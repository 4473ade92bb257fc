"""Token ids: text tokens, and numbers far above any, which are tokens of images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# The least id of an image's token.
FIRST_IMAGE_TOKEN = 1 << 62
# An id is FIRST_IMAGE_TOKEN, the image's number in 48 bits, and the token's in these.
TOKEN_BITS = 14
TOKEN_MASK = (1 << TOKEN_BITS) - 1
# Where tokens have positions in an image, the last bits of its number say how many columns of tokens it has.
COLUMN_BITS = 11
MOST_COLUMNS = (1 << COLUMN_BITS) - 1


def text_tokens_only(ids: Iterable[int]) -> list[int]:
    """Return ``ids`` without tokens of images."""
    return [token for token in ids if token < FIRST_IMAGE_TOKEN]


def has_images(ids: Iterable[int]) -> bool:
    """Return whether there are tokens of images among ``ids``."""
    return max(ids, default=0) >= FIRST_IMAGE_TOKEN


def image_number(key: str, columns: int = 0) -> int:
    """Return the number, of 48 bits, of the image whose content has the hash ``key``.

    ``columns`` of tokens are a part of it, unless 0.
    """
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")
    return number >> COLUMN_BITS << COLUMN_BITS | columns if columns else number


def image_of_token(token: int) -> int:
    """Return the number of the image that ``token`` is of."""
    return (token ^ FIRST_IMAGE_TOKEN) >> TOKEN_BITS


def image_numbers(ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for ``ids`` int64 [B, S] which are of the same image: its number from 1, and 0 for words.

    ``counts`` are the lengths of the rows, after which there is padding. Images with the same content are told
    apart, because an image's tokens begin with its first.
    """
    places = (ids >= FIRST_IMAGE_TOKEN) & (np.arange(ids.shape[1]) < counts[:, None])
    begins = places & (ids & TOKEN_MASK == 0)
    begins[:, 0] |= places[:, 0]
    return np.where(places, np.cumsum(begins, axis=1), 0)


def grid_positions(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return three positions for each of ``ids`` int64 [S], a text from its beginning, int64 [3, S], and the next.

    A word has the same number three times. Of an image's tokens the first is the position p where it begins, the
    second p and the row, the third p and the column; p and the longer side is where the text goes on.
    """
    positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids))).copy()
    places = ids >= FIRST_IMAGE_TOKEN
    if not places.any():
        return positions, len(ids)
    # Where images and the texts between them begin.
    changes = (places[1:] != places[:-1]) | (places[1:] & (ids[1:] & TOKEN_MASK == 0))
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    at = 0
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        if not places[start]:
            positions[:, start:stop] += at - start
            at += stop - start
            continue
        columns = max(1, image_of_token(int(ids[start])) & MOST_COLUMNS)
        rows, across = np.divmod(ids[start:stop] & TOKEN_MASK, columns)
        positions[:, start:stop] = at + np.stack([np.zeros_like(rows), rows, across])
        at += max(int(rows[-1]) + 1, columns)
    return positions, at


def between_images(rows: Sequence[Sequence[int]], end: int) -> int:
    """Return the first place from ``end`` on where no row is within an image."""
    while any(
        end < len(row)
        and row[end] >= FIRST_IMAGE_TOKEN
        and row[end] & TOKEN_MASK
        and row[end - 1] == row[end] - 1
        for row in rows
    ):
        end += 1
    return end


def begun_image(history: Sequence[int]) -> int:
    """Return how many tokens of an image end ``history``, 0 if it ends with a word."""
    if not history or history[-1] < FIRST_IMAGE_TOKEN:
        return 0
    return min(len(history), (history[-1] & TOKEN_MASK) + 1)


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many ids two sequences have in common before the first that differs."""
    size = min(len(left), len(right))
    if list(left[:size]) == list(right[:size]):
        # What nearly every call finds, and many times faster than numpy, which would copy lists number by number.
        return size
    return int(np.flatnonzero(np.asarray(left[:size]) != np.asarray(right[:size]))[0])
