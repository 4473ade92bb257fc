"""A model in numpy: logits that depend on the last token, with noise of any size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ortlm.dtypes import Floats
from ortlm.evaluation.chunks import Chunks
from ortlm.evaluation.types import Tokens
from ortlm.layerwise.types import Observe

VOCAB = 50


class FakeSource:
    def __init__(self, noise: float = 0.0, vocab: int = VOCAB) -> None:
        random = np.random.default_rng(0)
        table = 2 * random.normal(size=(VOCAB, vocab))
        self.table = (table + noise * random.normal(size=table.shape)).astype(np.float32)
        self.vocab_size = vocab
        self.asked: list[int] = []

    def open(self, chunks: Sequence[Tokens], observe: Observe | None = None) -> None:
        self.chunks = list(chunks)

    def logits(self, chunk: int) -> Floats:
        self.asked.append(chunk)
        found: Floats = self.table[self.chunks[chunk]]
        return found


def random_chunks(count: int = 3, size: int = 64) -> Chunks:
    tokens = np.random.default_rng(1).integers(0, VOCAB, (count, size))
    kinds = np.zeros_like(tokens)
    return Chunks(tuple(tokens), tuple(kinds), size, (), count * size, 0)
