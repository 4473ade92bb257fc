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
    floor = _floor(row, count) if _LONG * count <= len(row) else -np.inf
    # Among many equal values, such as what filters leave at -inf, partitioning would be slow.
    ids = np.flatnonzero(row >= floor if floor > -np.inf else row > -np.inf)
    if len(ids) < count:
        return np.arange(len(row))
    values = row[ids]
    least = np.partition(values, len(values) - count)[len(values) - count]
    positions: Ids = ids[values >= least]
    return positions


def descending(row: Row, ids: Ids) -> Ids:
    """Return ascending ``ids`` by their values, the largest first and the lowest id first among equals."""
    return ids[np.argsort(-row[ids], kind="stable")]


def _floor(row: Row, count: int) -> np.floating[Any]:
    """Return a number that is at most the ``count``-th largest value, and nearly always close to it.

    The row is folded into columns. The maxima of ``count`` columns are at least the result, so at least as
    many values are.
    """
    columns = max(8 * count, min(1024, len(row) // 8))
    rows = len(row) // columns
    maxima = row[: rows * columns].reshape(rows, columns).max(axis=0)
    floor: np.floating[Any] = np.partition(maxima, columns - count)[columns - count]
    return floor
