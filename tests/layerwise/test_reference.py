"""The reference: logits of chunks do not depend on which of them are computed together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ortlm.checkpoint.reader import open_checkpoint
from ortlm.layerwise import alignment
from ortlm.layerwise.reference import Reference, open_reference
from ortlm.weights import reader
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture

CHUNKS = [np.arange(3, 3 + length, dtype=np.int64) for length in (16, 16, 9, 16)]


@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_chunks_together_and_alone(at_once: int, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "LOGITS_BYTES", at_once)
    together = open_reference(saved("qwen3").folder, threads=1)
    together.open(CHUNKS)
    for number, chunk in enumerate(CHUNKS):
        alone = open_reference(saved("qwen3").folder, threads=1)
        alone.open([chunk])
        assert np.abs(together.logits(number) - alone.logits(0)).max() < 1e-4
        alone.close()
    together.close()


def test_what_layers_are_given_comes_chunk_by_chunk(saved: Any) -> None:
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    reference: Reference = open_reference(saved("llama").folder, threads=1)
    reference.open(CHUNKS, lambda layer, chunk, x: seen.update({(layer, chunk): x.shape}))
    layers = max(layer for layer, _ in seen)
    for layer in range(layers + 1):
        assert [seen[layer, i][0] for i in range(len(CHUNKS))] == [len(chunk) for chunk in CHUNKS]
    reference.close()


@pytest.mark.parametrize("piece", [1, 100, 1 << 19])
def test_weights_read_in_pieces(piece: int, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_PIECE_NUMBERS", piece)
    found = open_checkpoint(saved("llama").folder)
    weights = Weights(found, stored_architecture(found))
    names = ["layers.0.q.weight", "layers.0.k.weight", "layers.0.v.weight"]
    whole = weights.read(names)
    with ThreadPoolExecutor(2) as pool:
        out = np.empty_like(whole)
        weights.read_into(out, names, pool)
        assert np.array_equal(out, whole)
        part = np.empty_like(whole[5:])
        weights.read_into(part, names, pool, 5)
        assert np.array_equal(part, whole[5:])
