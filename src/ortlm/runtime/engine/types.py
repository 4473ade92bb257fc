"""Types that the parts of the runtime share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ortlm.runtime.engine.backend import DeviceTensor

# The token ids of one row so far, int64 [T].
History = NDArray[np.int64]
# One token of each row, int64 [B].
Tokens = NDArray[np.int64]
# Scores before softmax, float32 [V] for one row, [B, V] for a batch.
Logits = NDArray[np.float32]
# From a row's history and logits to new logits.
Processor = Callable[[History, Logits], Logits]


class TokenEmbedder(Protocol):
    """Token ids to the embeddings that a decoder reads."""

    def hold(self, rows: Iterable[Sequence[int]]) -> None:
        """Keep what the ids of ``rows`` need, and nothing else."""

    def embed(self, ids: NDArray[np.int64]) -> DeviceTensor:
        """Return the embeddings [B, S, H] of ``ids`` int64 [B, S]."""
