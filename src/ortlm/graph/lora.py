"""Low-rank adapters that are switched while the model runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ortlm.dtypes import dtype
from ortlm.graph.builder import Builder, Shape, Value
from ortlm.graph.weight_plan import LowRank
from ortlm.spec import Parameter


def is_adapted(g: Builder, weights: Sequence[Parameter]) -> bool:
    """Return whether adapters change any of ``weights``."""
    return any(p.name in g.adapted for p in weights)


def add_lora(
    g: Builder, x: Value, y: Value, weights: Sequence[Parameter], *, module: str, path: str, shape: Shape
) -> Value:
    """Return ``y + (x · A) · B``, or ``y`` itself if none of the ``weights`` is adapted.

    ``y`` [B, S, out] is ``x`` [B, S, in] of ``shape`` times the ``weights``. A [in, r] and B [r, out] are optional
    inputs called ``{module}.lora_A`` and ``{module}.lora_B``; without them r is 0, and nothing is added.
    """
    if not is_adapted(g, weights):
        return y
    out, inputs = sum(p.shape[0] for p in weights), weights[0].shape[1]
    kind = dtype(g.dtype).numpy
    pair = LowRank(tuple(weights), f"{module}.lora_A", f"{module}.lora_B")
    g.plan.low_rank.append(pair)
    # Every product has a rank of its own: adapters differ in it from module to module.
    rank = f"{module}.rank"
    a = g.optional_input(pair.a, np.zeros((inputs, 0), kind), (inputs, rank))
    b = g.optional_input(pair.b, np.zeros((0, out), kind), (rank, out))
    low = g.op("MatMul", x, a, shape=(*shape[:-1], rank), name=f"{path}/lora_A")
    more = g.op("MatMul", low, b, shape=(*shape[:-1], out), name=f"{path}/lora_B")
    return g.op("Add", y, more, shape=(*shape[:-1], out), name=f"{path}/lora")
