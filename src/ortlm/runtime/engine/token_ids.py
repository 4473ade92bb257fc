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


def text_tokens_only(ids: Iterable[int]) -> list[int]:
    """Return ``ids`` without tokens of images."""
    return [token for token in ids if token < FIRST_IMAGE_TOKEN]


def image_number(key: str) -> int:
    """Return the number, of 48 bits, of the image whose content has the hash ``key``."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


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
