"""Where batches of equal rows begin, so that a part of the rows is computed as it is among all of them."""

from __future__ import annotations

# Rows of the same length run together, up to so many tokens: large enough for fast products.
BATCH_TOKENS = 2048
# Logits that are in memory before somebody asks for them.
LOGITS_BYTES = 64 << 20


def batch_rows(length: int) -> int:
    """Return how many rows of ``length`` tokens run together; each batch begins at a multiple of it."""
    return max(1, BATCH_TOKENS // length)


def logits_rows(length: int, vocab: int) -> int:
    """Return of how many rows of ``length`` tokens the head computes the logits together, a part of a batch."""
    rows, most = batch_rows(length), max(1, LOGITS_BYTES // (4 * vocab * length))
    return max(count for count in range(1, rows + 1) if rows % count == 0 and count <= most)
