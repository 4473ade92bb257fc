"""The tokens of a batch: what each row holds, and where its answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ortlm.errors import BadOption, CannotRewind
from ortlm.runtime.engine.types import History


class TokenRows:
    """Token ids of several rows, each with a length of its own.

    ``lengths`` and ``starts`` are int64 [B]: how many tokens a row has, and how many of them are its prompt.
    """

    def __init__(self, count: int) -> None:
        self._tokens: History = np.full((count, 64), -1, dtype=np.int64)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.starts = np.zeros(count, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def history(self) -> History:
        """All tokens, int64 [B, T], shorter rows padded on the right with -1."""
        return self._tokens[:, : int(self.lengths.max())]

    def tokens(self, row: int, start: int = 0) -> NDArray[np.int64]:
        """Return a row's tokens from ``start`` on, int64."""
        return self._tokens[row, start : self.lengths[row]]

    def prompt(self, row: int) -> list[int]:
        """Return the tokens before a row's answer."""
        ids: list[int] = self._tokens[row, : self.starts[row]].tolist()
        return ids

    def answer(self, row: int) -> list[int]:
        """Return the tokens of a row's answer so far."""
        ids: list[int] = self._tokens[row, self.starts[row] : self.lengths[row]].tolist()
        return ids

    def answer_length(self, row: int) -> int:
        """Return how many tokens the answer of ``row`` has so far."""
        return int(self.lengths[row] - self.starts[row])

    def put(self, row: int, token: int) -> None:
        """Add one token to a row's answer."""
        at = int(self.lengths[row])
        self._reach(at + 1)
        self._tokens[row, at] = token
        self.lengths[row] = at + 1

    def put_each(self, tokens: Sequence[int]) -> None:
        """Add one token to the answer of every row; -1 for a row that gets none."""
        lengths = self.lengths.tolist()
        self._reach(max(lengths) + 1)
        # After a run of the model every call of numpy is a slow one; rows are few.
        for row, (at, token) in enumerate(zip(lengths, tokens, strict=True)):
            if token >= 0:
                self._tokens[row, at] = token
                self.lengths[row] = at + 1

    def prompt_with(self, row: int, tokens: Sequence[int]) -> None:
        """Add tokens to a row and let its answer begin after them."""
        at = int(self.lengths[row])
        self._reach(at + len(tokens))
        self._tokens[row, at : at + len(tokens)] = tokens
        self.lengths[row] = self.starts[row] = at + len(tokens)

    def cut(self, row: int, length: int) -> bool:
        """Shorten a row to ``length`` tokens; returns whether that was a change."""
        if length >= self.lengths[row]:
            return False
        self._tokens[row, length:] = -1
        self.lengths[row] = length
        self.starts[row] = min(int(self.starts[row]), length)
        return True

    def select(self, rows: NDArray[np.int64]) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken more than once."""
        self._tokens = self._tokens[rows]
        self.lengths, self.starts = self.lengths[rows], self.starts[rows]

    def _reach(self, length: int) -> None:
        old = self._tokens
        if length > old.shape[1]:
            self._tokens = np.full((len(old), max(length + 64, 2 * old.shape[1])), -1, old.dtype)
            self._tokens[:, : old.shape[1]] = old


def as_rows(tokens: Any) -> list[list[int]]:
    """Return token ids, of one row or of several, as lists. Raises BadOption for anything else."""
    if isinstance(tokens, (str, bytes)) or not hasattr(tokens, "__len__"):
        raise BadOption(
            f"append takes token ids; encode texts first (lm.encode). Found {type(tokens).__name__}."
        )
    array = tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)
    rows = array if array and hasattr(array[0], "__len__") else [array]
    found = []
    for row in rows:
        if isinstance(row, (str, bytes)) or not hasattr(row, "__len__"):
            raise BadOption("append takes token ids, or one list of them for each row; found a mixture.")
        # Long prompts are looked at one by one only if that finds something.
        usual = set(map(type, row)) <= {int}
        for token in () if usual else row:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise BadOption(f"append takes token ids, which are whole numbers; found {token!r}.")
        found.append(list(row) if usual else [int(token) for token in row])
    return found


def as_lengths(lengths: ArrayLike, rows: TokenRows) -> list[int]:
    """Return the lengths to rewind to, row by row. Raises CannotRewind for those that are not there."""
    array = np.asarray(lengths)
    each = [int(array)] * len(rows) if array.ndim == 0 else [int(length) for length in array]
    if len(each) != len(rows):
        raise BadOption(f"there are {len(rows)} rows, but {len(each)} lengths were given.")
    for row, length in enumerate(each):
        if not 0 <= length <= rows.lengths[row]:
            raise CannotRewind(f"row {row} has {rows.lengths[row]} tokens and cannot rewind to {length}.")
    return each
