"""Types that the parts of an evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ortlm.dtypes import Floats
from ortlm.layerwise.types import Observe

Tokens = NDArray[np.int64]


class Source(Protocol):
    """A model that gives logits of chunks of tokens."""

    @property
    def vocab_size(self) -> int:
        """How many logits there are, V."""

    def open(self, chunks: Sequence[Tokens], observe: Observe | None = None) -> None:
        """Take all chunks that will be asked for, in place of those before; they may differ in length.

        ``observe`` is called with what goes through the layers, of the first two chunks at least.
        """

    def logits(self, chunk: int) -> Floats:
        """Return the logits after every token of a chunk, [S, V]. Chunks are asked for once, in order."""
