"""Token ids: words of the vocabulary, and numbers far above any, which are tokens of pictures."""

from __future__ import annotations

from collections.abc import Iterable

# The least id of a picture's token.
FIRST_PICTURE = 1 << 62


def words_only(ids: Iterable[int]) -> list[int]:
    """Return ``ids`` without tokens of pictures."""
    return [token for token in ids if token < FIRST_PICTURE]
