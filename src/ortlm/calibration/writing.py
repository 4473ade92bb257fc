"""What it takes to let a model write the text that it is calibrated on; known without loading ONNX Runtime."""

from __future__ import annotations

from ortlm._utils.cpu import memory_bytes

# Memory for the cache while the model writes, and at most, where so few rows would fit into it that a step, which
# reads all weights, would serve too few.
_CACHE_BYTES, _MOST_CACHE_BYTES, _FEW_ROWS = 1 << 29, 1 << 31, 64
# And for the logits of all rows, of which there are two copies.
_LOGITS_BYTES = 1 << 27
_MOST_ROWS = 256


def draft_in_8_bits(parameters: int) -> bool:
    """Return whether the draft that writes has a byte for each weight, for integer matmul.

    That is nearer to the checkpoint than 4 bits, and faster with the many rows of a draft. It takes twice the
    memory, so where weights would fill more than a third of it, the draft has 4 bits.
    """
    memory = memory_bytes()
    return memory is None or 3 * parameters <= memory


def rows_at_once(row_bytes: int, vocab: int) -> int:
    """Return how many rows are written at once, whose cache takes ``row_bytes`` each, with ``vocab`` tokens."""
    row_bytes = max(1, row_bytes)
    cached = max(_CACHE_BYTES // row_bytes, min(_FEW_ROWS, _MOST_CACHE_BYTES // row_bytes))
    return max(1, min(_MOST_ROWS, cached, _LOGITS_BYTES // (4 * vocab)))


def writing_bytes(parameters: int, *, rows: int, row_bytes: int, vocab: int) -> int:
    """Return about how much memory it takes to write ``rows`` rows: the draft, its cache and its logits."""
    rows = min(rows, rows_at_once(row_bytes, vocab))
    weights = parameters if draft_in_8_bits(parameters) else 5 * parameters // 8
    return weights + rows * (row_bytes + 2 * 4 * vocab)
