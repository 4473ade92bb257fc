"""Where there are several residual streams: what they begin with, for tokens that are known before."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ortlm.dtypes import Floats
from ortlm.graph.altup import LEAST
from ortlm.layerwise.per_layer_inputs import LookedUp
from ortlm.spec import Decoder
from ortlm.weights.reader import Weights


def spread(weights: Weights, spec: Decoder, embeddings: Floats, change: Mapping[str, LookedUp]) -> Floats:
    """Return the streams [n, streams · H] that begin with ``embeddings`` [n, H].

    ``change`` has what becomes of the rows of their maps, by name.
    """
    if spec.altup is None:
        return embeddings
    streams, size = [embeddings], np.square(embeddings).mean(axis=-1, keepdims=True)
    for i in range(1, spec.altup.streams):
        name = f"altup_in{i}.weight"
        matrix = weights.read([name])
        if name in change:
            matrix = change[name](matrix)
        x = embeddings @ matrix.T
        least = np.maximum(np.square(x).mean(axis=-1, keepdims=True), np.float32(LEAST))
        streams.append(x * np.sqrt(size / least))
    return np.concatenate(streams, axis=-1)
