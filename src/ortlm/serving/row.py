"""What a Generator sees of its row of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.errors import Error
from ortlm.runtime.engine.types import Logits


class RowLoop:
    """A decode loop of one row that another one feeds: for a Generator it is a Loop.

    The engine feeds the tokens of all rows together and leaves each row's logits here with ``give``; the row's
    Generator then chooses by them as it would alone. So whatever settings can ask for means the same in a batch.
    """

    def __init__(self, ids: Sequence[int], *, context_tokens: int, switch_tokens: int | None) -> None:
        # What the model has seen of the row; the Generator's own view may be one token behind.
        self.tokens = list(ids)
        self.history: list[list[int]] = [list(ids)]
        self.context_tokens = context_tokens
        self.switch_tokens = switch_tokens
        self._logits: Logits | None = None

    def give(self, logits: NDArray[np.float32]) -> None:
        """Take the logits float32 [V] after the row's last token. They may be overwritten after the next step."""
        self._logits = logits[None]

    def append_unread(self, rows: Sequence[Sequence[int]]) -> Logits:
        """Return the logits float32 [1, V] after ``rows``, the one row's new tokens, which were fed already."""
        (new,) = rows
        (history,) = self.history
        history.extend(new)
        if self._logits is None or len(history) != len(self.tokens) or history[-1] != self.tokens[-1]:
            raise Error(
                f"the row holds {len(history)} tokens, but the batch has computed {len(self.tokens)} of it."
            )
        logits, self._logits = self._logits, None
        return logits

    def step_unread(self, tokens: Sequence[int]) -> Logits:
        """Return the logits float32 [1, V] after the one of ``tokens``."""
        return self.append_unread([tokens])

    def trim(self, lengths: Iterable[int]) -> None:
        """Shorten the Generator's view, which then appends the tokens whose logits it wants."""
        (length,) = lengths
        del self.history[0][length:]

    def use(self, inputs: Mapping[str, Any]) -> None:
        """Pass over the tensors of an adapter: the loop that computes the row has them."""

    def cancel(self) -> None:
        """Pass over it: the engine ends requests between two runs."""

    def resume(self) -> None:
        """Pass over it, as ``cancel``."""
