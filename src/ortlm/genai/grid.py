"""The tokens of a batch as this API shows them: columns, padding included."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int32Ids = NDArray[np.int32]


class Grid:
    """Token ids int32 [B, T], some of them padding: the rows that the model has are without it."""

    def __init__(self, rows: int) -> None:
        self._tokens: Int32Ids = np.zeros((rows, 64), dtype=np.int32)
        self._real: NDArray[np.bool_] = np.zeros((rows, 64), dtype=np.bool_)
        self.width = 0

    def put(self, tokens: Int32Ids, real: NDArray[np.bool_]) -> None:
        """Add columns [B, S]; ``real`` says which tokens are no padding."""
        end = self.width + tokens.shape[1]
        if end > self._tokens.shape[1]:
            more = ((0, 0), (0, end))
            self._tokens, self._real = np.pad(self._tokens, more), np.pad(self._real, more)
        self._tokens[:, self.width : end] = tokens
        self._real[:, self.width : end] = real
        self.width = end

    def repeat(self, times: int) -> None:
        """Make so many rows of each."""
        self._tokens = np.repeat(self._tokens, times, axis=0)
        self._real = np.repeat(self._real, times, axis=0)

    def cut(self, width: int) -> None:
        """Keep the first ``width`` columns."""
        self.width = width

    def lengths(self, width: int) -> list[int]:
        """Return how many tokens of each row lie in the first ``width`` columns."""
        counts: list[int] = self._real[:, :width].sum(axis=1).tolist()
        return counts

    def row(self, row: int, width: int) -> Int32Ids:
        """Return a copy of a row's first ``width`` tokens."""
        return self._tokens[row, :width].copy()

    def column(self, at: int) -> Int32Ids:
        """Return a copy of one column."""
        return self._tokens[:, at].copy()

    def tokens(self, width: int) -> Int32Ids:
        """Return the first ``width`` columns."""
        return self._tokens[:, :width]

    def real(self, width: int) -> NDArray[np.bool_]:
        """Return which tokens of the first ``width`` columns are no padding."""
        return self._real[:, :width]
