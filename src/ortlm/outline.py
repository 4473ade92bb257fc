"""What a build would give, known before any weight is read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from ortlm.checkpoint.open import Checkpoint
from ortlm.cores import physical_cores
from ortlm.dtypes import dtype
from ortlm.graph.storage import Plan, Quantized
from ortlm.quant.rounding import quantizer
from ortlm.quant.scheme import Scheme
from ortlm.spec import Decoder, parameters
from ortlm.target import Target


@dataclass(frozen=True, slots=True)
class Outline:
    """What a build would give, known before any weight is read.

    Sizes in bytes; ``bits_per_weight`` counts scales and zero points; ``seconds`` is an estimate from a short
    measurement on this machine, None where nothing was measured.
    """

    source: str
    model_type: str
    target: str
    precision: str
    recipe: str
    parameters: int
    layers: int
    context_tokens: int
    checkpoint_bytes: int
    output_bytes: int
    bits_per_weight: float
    peak_memory_bytes: int
    cache_bytes_per_token: int
    seconds: float | None = None


def make_outline(
    checkpoint: Checkpoint,
    spec: Decoder,
    plan: Plan,
    *,
    target: Target,
    precision: str,
    data_bytes: int,
    other_bytes: int,
) -> Outline:
    """Return the outline; ``data_bytes`` is the size of the weights' file, ``other_bytes`` of files copied."""
    kind_of_cache = target.precisions[precision]
    count = sum(p.size for p in parameters(spec))
    schemes: dict[str, int] = {}
    for item in plan.items:
        if isinstance(item, Quantized):
            kind = str(item.scheme)
            schemes[kind] = schemes.get(kind, 0) + item.rows * item.inputs
    parts = [
        f"{kind} ({n / count:.0%} of weights)" for kind, n in sorted(schemes.items(), key=lambda s: -s[1])
    ]
    return Outline(
        source=checkpoint.source,
        model_type=str(checkpoint.config["model_type"]),
        target=target.name,
        precision=precision,
        recipe="; ".join(parts) or f"{kind_of_cache} weights",
        parameters=count,
        layers=len(spec.layers),
        context_tokens=spec.max_tokens,
        checkpoint_bytes=checkpoint.bytes,
        # Nodes and small constants take about as much as this for each layer.
        output_bytes=data_bytes + other_bytes + 20_000 * len(spec.layers) + 100_000,
        bits_per_weight=round(8 * data_bytes / count, 3),
        # Python with its libraries, and a few copies of the rows that each core holds.
        peak_memory_bytes=100_000_000 + 20_000_000 * (physical_cores() or os.cpu_count() or 1),
        cache_bytes_per_token=sum(
            2 * layer.mixer.kv_heads * layer.mixer.head_dim * dtype(kind_of_cache).bytes
            for layer in spec.layers
        ),
    )


def measure_seconds(outline: Outline, plan: Plan) -> float:
    """Return about how long writing would take in seconds, from quantizing a small sample on this machine."""
    sample = np.random.default_rng(0).standard_normal((256, 2048), dtype=np.float32)
    quantizing = 0.0
    rates: dict[Scheme, float] = {}
    for item in plan.items:
        if isinstance(item, Quantized):
            if item.scheme not in rates:
                run = quantizer(item.scheme.algorithm)
                run(sample, item.scheme)  # the first run pays for what later ones find ready
                began = time.perf_counter()
                run(sample, item.scheme)
                rates[item.scheme] = (time.perf_counter() - began) / sample.size
            quantizing += rates[item.scheme] * item.rows * item.inputs
    # Reading and writing at the speed of a common disk, and starting.
    moving = outline.checkpoint_bytes / 1.5e9 + outline.output_bytes / 1e9
    return 2.0 + quantizing / (physical_cores() or 1) + moving
