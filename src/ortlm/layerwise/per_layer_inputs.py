"""Per-layer embeddings of tokens that are known before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.dtypes import Floats
from ortlm.spec import PerLayerInputs
from ortlm.weights.reader import Weights

# What becomes of rows [n, width] that are looked up.
LookedUp = Callable[[Floats], Floats]


class PerLayerRows:
    """The vectors of ``PerLayerInputs``, one layer at a time: all together they would be larger than the states.

    ``tokens`` are all that there are, sorted, ``embeddings`` [n, H] theirs, and ``places`` int64 [B, S] say for
    each batch which they are. ``change`` has what becomes of the rows of the table and of the map, by name.
    """

    def __init__(
        self,
        weights: Weights,
        spec: PerLayerInputs,
        tokens: NDArray[np.int64],
        embeddings: Floats,
        places: Sequence[NDArray[np.intp]],
        change: Mapping[str, LookedUp],
    ) -> None:
        self._weights, self._spec, self._change = weights, spec, change
        self._tokens = np.where(tokens < spec.vocab, tokens, 0)
        self._embeddings, self._places = embeddings, places

    def of(self, layer: int) -> list[Floats]:
        """Return the vectors of ``layer`` for each batch, [B, S, width]."""
        spec, table = self._spec, self._weights.stack(["per_layer_embed.weight"])
        part = slice(layer * spec.width, (layer + 1) * spec.width)
        rows = np.concatenate([table.rows(int(t), int(t) + 1)[:, part] for t in self._tokens])
        name = f"layers.{layer}.per_layer_map.weight"
        rows = self._changed("per_layer_embed.weight", rows)
        mapped = self._embeddings @ self._changed(name, self._weights.read([name])).T
        mapped *= np.float32(spec.map_scale)
        mapped /= np.sqrt(np.square(mapped).mean(axis=-1, keepdims=True) + np.float32(spec.norm.eps))
        mapped *= self._weights.read(["per_layer_map_norm.weight"])
        vectors = (np.float32(spec.scale) * rows + mapped) * np.float32(2**-0.5)
        return [vectors[place] for place in self._places]

    def _changed(self, name: str, rows: Floats) -> Floats:
        change = self._change.get(name)
        return rows if change is None else change(rows)
