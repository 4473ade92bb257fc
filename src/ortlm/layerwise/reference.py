"""A checkpoint in fp32 as the reference that its quantized models are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ortlm.checkpoint.hub import find_checkpoint
from ortlm.dtypes import Floats
from ortlm.errors import BadOption
from ortlm.graph.builder import Product
from ortlm.layerwise.alignment import logits_rows
from ortlm.layerwise.model import LayerwiseModel
from ortlm.layerwise.types import Observe
from ortlm.weights.lora import merge
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture


def open_reference(
    source: str | Path,
    *,
    adapters: Sequence[tuple[str | Path, float]] = (),
    cache: str | Path | None = None,
    threads: int | None = None,
) -> Reference:
    """Return the checkpoint ``source``, a folder or a name on the hub, as a reference.

    The LoRA ``adapters``, each times its number, become part of its weights. Raises what a build of it would
    raise.
    """
    checkpoint = find_checkpoint(source, name=None, cache=Path(cache) if cache else None, token=None)
    architecture, merged = merge(adapters, checkpoint, stored_architecture(checkpoint))
    changes = merged.changes if merged is not None else None
    return Reference(Weights(checkpoint, architecture, changes), threads=threads)


class Reference:
    """The logits of a model in fp32 for chunks of tokens that are known before.

    All chunks go through one layer before the next one's weights are read, so memory holds one layer and the
    states of all chunks, whatever the model.
    """

    def __init__(self, weights: Weights, *, threads: int | None = None) -> None:
        self._model = LayerwiseModel(weights, threads=threads)
        self.vocab_size = weights.spec.vocab
        self._states: list[Floats] = []
        self._logits: dict[int, Floats] = {}

    def open(self, chunks: Sequence[NDArray[np.int64]], observe: Observe | None = None) -> None:
        """Compute the last layer's states of every chunk, int64 [S] each.

        ``observe`` is called with what each layer's attention is given in each chunk, and for the number of
        layers with what the head is given.
        """
        model = self._model
        self._logits = {}
        states = model.embed([np.asarray(chunk, np.int64) for chunk in chunks])
        for index in range(len(model.spec.layers)):
            watch = None if observe is None else _Watch(index, observe)
            states, _ = model.layer(index, states, watch)
        self._states = _one_by_one(states)
        if observe is not None:
            for i, x in enumerate(_one_by_one(model.head_inputs(states))):
                observe(len(model.spec.layers), i, x[0])

    def logits(self, chunk: int) -> Floats:
        """Return the logits float32 [S, V] after every token of chunk number ``chunk``."""
        if not 0 <= chunk < len(self._states):
            raise BadOption(f"there are {len(self._states)} chunks; there is no number {chunk}.")
        if chunk not in self._logits:
            # The head's weights are read once for several chunks.
            length = self._states[chunk].shape[1]
            several = logits_rows(length, self.vocab_size)
            alike = [
                i
                for i, states in enumerate(self._states[chunk : chunk + several], chunk)
                if states.shape[1] == length
            ]
            found = self._model.logits(np.concatenate([self._states[i] for i in alike]))
            self._logits = dict(zip(alike, found, strict=True))
        return self._logits.pop(chunk)

    def close(self) -> None:
        """Free what the model holds on disk and in memory."""
        self._states, self._logits = [], {}
        self._model.close()


class _Watch:
    """Shows the first product's inputs, which are what attention is given."""

    def __init__(self, index: int, observe: Observe) -> None:
        self._index, self._observe = index, observe

    def __call__(
        self, product: Product, inputs: list[Floats], floats: list[Floats] | None, weight: Floats
    ) -> Floats:
        if product.parameters[0] == f"layers.{self._index}.q.weight":
            for i, x in enumerate(_one_by_one(inputs)):
                self._observe(self._index, i, x[0])
        return weight


def _one_by_one(batches: Sequence[Floats]) -> list[Floats]:
    """Return the rows of ``batches`` [B, S, H] as [1, S, H] each, in their order."""
    return [batch[i : i + 1] for batch in batches for i in range(len(batch))]
