"""Few tokens out of a large vocabulary, without sorting it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Row = NDArray[np.floating[Any]]

# A row this many times longer than the number wanted is searched by columns first.
_LONG = 32


def possible(row: Row) -> tuple[Ids | None, Row]:
    """Return the ids whose logits are above -inf, and these logits; None and the whole row if most are."""
    above = row > -np.inf
    if 8 * np.count_nonzero(above) > len(row):
        # Many ids cost more than the few impossible tokens among them, whose probability is 0 anyway.
        return None, row
    ids = np.flatnonzero(above)
    return ids, row[ids]


def largest(row: Row, count: int) -> Ids:
    """Return where the ``count`` largest values of ``row`` lie, and all that equal the least of them.

    Positions ascend, so that a stable sort by value puts the lowest first among equals. NaN is not allowed.
    """
    if count >= len(row):
        return np.arange(len(row))
    floor: Any = _floor(row, count) if _LONG * count <= len(row) else -np.inf
    # Among many equal values, such as what filters leave at -inf, partitioning would be slow.
    ids = np.flatnonzero(row >= floor if floor > -np.inf else row > -np.inf)
    if len(ids) < count:
        return np.arange(len(row))
    values = row[ids]
    least = np.partition(values, len(values) - count)[len(values) - count]
    positions: Ids = ids[values >= least]
    return positions


def largest_each(logits: NDArray[np.floating[Any]], count: int) -> Ids | None:
    """Return what ``largest`` finds in every row of ``logits`` [B, V], int64 [B, n], all rows at once.

    None where rows differ in n, by values that are equal, and where ``largest`` goes another way. NaN is not
    allowed.
    """
    batch, size = logits.shape
    if not count or _LONG * count > size:
        return None
    floors = _floor(logits, count)
    if not (floors > -np.inf).all():
        return None
    above = logits >= floors[:, None]
    rows, ids = np.divmod(np.flatnonzero(above), size)
    counts = np.bincount(rows, minlength=batch)
    # A row in each line, filled up with what no value is below.
    places = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = np.full((batch, counts.max()), -np.inf, logits.dtype)
    values[rows, places] = logits[rows, ids]
    least = np.partition(values, values.shape[1] - count, axis=1)[:, -count]
    kept = values >= least[:, None]
    found = kept.sum(axis=1)
    if (found != found[0]).any():
        return None
    chosen: Ids = ids[kept[rows, places]].reshape(batch, found[0])
    return chosen


def descending(row: Row, ids: Ids) -> Ids:
    """Return ascending ``ids`` by their values, the largest first and the lowest id first among equals."""
    return ids[np.argsort(-row[ids], kind="stable")]


def _floor(values: NDArray[np.floating[Any]], count: int) -> Any:
    """Return a number that is at most the ``count``-th largest of values [V] or [B, V], and nearly always close.

    A row is folded into columns. The maxima of ``count`` columns are at least the result, so at least as many
    values are.
    """
    size = values.shape[-1]
    columns = max(8 * count, min(1024, size // 8))
    rows = size // columns
    folded = values[..., : rows * columns].reshape(*values.shape[:-1], rows, columns)
    return np.partition(folded.max(axis=-2), columns - count)[..., columns - count]
