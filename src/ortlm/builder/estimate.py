"""What a build would give, known before any weight is read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ortlm._utils.cpu import fast_integer_matmul, physical_cores
from ortlm.calibration.writing import writing_bytes
from ortlm.checkpoint.reader import Checkpoint
from ortlm.dtypes import BY_NAME
from ortlm.graph.weight_plan import Columns, Plan, Quantized
from ortlm.quant.algorithms import KEPT, quantizer
from ortlm.quant.scheme import Scheme
from ortlm.spec import Architecture, Decoder, Experts
from ortlm.target import Target

OWN_TEXT = "text that the model writes itself"


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What the model reads to be calibrated: ``rows`` of ``length`` tokens of ``source``."""

    source: str
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """How many tokens that makes."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Outline:
    """What a build would give, known before any weight is read.

    Sizes in bytes; ``bits_per_weight`` counts scales and zero points; ``seconds`` is an estimate from a short
    measurement on this machine, None where nothing was measured. ``kv_cache`` is how keys and values are stored:
    an element type, or int8 with the kind of its scales. ``adapter_bytes`` is the size of each adapter's file, by
    name; ``merged_adapter`` the folder of the one that was added to the weights. ``recipe`` says in words which
    weights are stored how, ``recipe_name`` where that comes from; ``calibration`` is None if nothing is read.
    ``rotated``: the residual stream was turned before. ``images``: the model sees images. ``stored_before`` says
    of a quantized checkpoint which of its types were carried over and which dequantized. ``notes``: what the
    checkpoint asks for and the build passes over, a sentence each. ``dtype`` is what transformers.js calls the
    graph, None where it is not made for that.
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
    kv_cache: str
    adapter_bytes: Mapping[str, int] = field(default_factory=dict)
    merged_adapter: str | None = None
    recipe_name: str | None = None
    rotated: bool = False
    calibration: CalibrationPlan | None = None
    images: bool = False
    stored_before: str = ""
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    dtype: str | None = None

    @property
    def made_for(self) -> str:
        """Precision and target in words."""
        return (
            f"{self.precision} for {self.target}"
            if self.dtype is None
            else f"{self.dtype} for transformers.js"
        )


def make_outline(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: Plan,
    *,
    target: Target,
    precision: str,
    decoders: int,
    data_bytes: int,
    other_bytes: int,
    adapter_bytes: Mapping[str, int],
    merged_adapter: str | None,
    kv_cache: str = "none",
    recipe_name: str | None = None,
    rotated: bool = False,
    calibration: CalibrationPlan | None = None,
    stored_before: str = "",
    notes: Iterable[str] = (),
    dtype: str | None = None,
) -> Outline:
    """Return the outline.

    ``data_bytes`` is the size of the weights' file, ``other_bytes`` of files copied; ``decoders`` counts the
    graphs of the decoder.
    """
    adapters = sum(adapter_bytes.values())
    activations = target.precisions[precision]
    kind_of_cache = activations if kv_cache == "none" else "int8"
    spec = architecture.decoder
    count = sum(p.size for p in architecture.parameters)
    schemes: dict[str, int] = {}
    for item in plan.items:
        if isinstance(item, Quantized):
            kind = str(item.scheme)
            schemes[kind] = schemes.get(kind, 0) + item.rows * item.inputs
        elif isinstance(item, Columns):
            kind = "int8 per column, for integer matmul"
            schemes[kind] = schemes.get(kind, 0) + item.rows * item.inputs
    parts = [
        f"{kind} ({n / count:.0%} of weights)" for kind, n in sorted(schemes.items(), key=lambda s: -s[1])
    ]
    return Outline(
        source=checkpoint.source,
        model_type=str(checkpoint.config["model_type"]),
        target=target.name,
        precision=precision,
        recipe="; ".join(parts) or f"{activations} weights",
        parameters=count,
        layers=len(spec.layers),
        context_tokens=spec.max_tokens,
        checkpoint_bytes=checkpoint.bytes,
        output_bytes=data_bytes + other_bytes + adapters + decoders * _graph_bytes(spec, kv_cache) + 100_000,
        bits_per_weight=round(8 * data_bytes / count, 3),
        # Python with its libraries, and a few copies of the rows that each core holds; an adapter's file is made
        # in memory, by ONNX Runtime. An int8 cache is measured on the model itself, loaded and packed again.
        peak_memory_bytes=100_000_000
        + 20_000_000 * (physical_cores() or os.cpu_count() or 1)
        + (0 if kv_cache == "none" else 100_000_000 + 3 * data_bytes // 2)
        + (50_000_000 + 3 * max(adapter_bytes.values()) if adapter_bytes else 0)
        + (0 if calibration is None else _calibration_bytes(spec, calibration, count)),
        cache_bytes_per_token=sum(
            2 * mixer.kv_heads * mixer.head_dim * BY_NAME[kind_of_cache].bytes for _, mixer in spec.cached
        ),
        kv_cache=kv_cache if kv_cache != "none" else kind_of_cache,
        adapter_bytes=dict(adapter_bytes),
        merged_adapter=merged_adapter,
        recipe_name=recipe_name,
        rotated=rotated,
        calibration=calibration,
        images=architecture.vision is not None,
        stored_before=stored_before,
        notes=(*architecture.notes, *notes),
        dtype=dtype,
    )


def _graph_bytes(spec: Decoder, kv_cache: str) -> int:
    """Return about the size of a file with the decoder's graph, without the weights."""
    each_channel = kv_cache == "int8_per_channel"
    # Nodes and small constants; and what one step of an int8 cache means, twice in fp32.
    scales = sum(8 * mixer.kv_heads * mixer.head_dim for _, mixer in spec.cached) if each_channel else 0
    return 15_000 * len(spec.layers) + scales


def _calibration_bytes(spec: Decoder, plan: CalibrationPlan, parameters: int) -> int:
    """Return about how much memory calibration takes, or writing its text if that is more.

    That is of one layer the weights, moments and inputs of products; then the whole model, and a cache.
    """
    most, tokens = 0, plan.tokens
    for layer in spec.layers:
        wide = layer.mixer.width
        # Of experts one is in memory at a time, next to the one that computes all tokens.
        inner = layer.ffn.intermediate
        if isinstance(layer.ffn, Experts):
            inner = max(inner, layer.ffn.shared)
        widths = (spec.hidden, wide, spec.hidden, inner)
        matrices = {"qkv": 3 * wide * spec.hidden, "ffn": 2 * inner * spec.hidden}
        # Moments, drift and factors in fp32; of each token the residual stream and what is multiplied, of the
        # float model and of ours, and with experts what several of them return; the matrices in fp32, and three
        # in 8 bits in several layouts.
        values = 2 * (spec.hidden + max(widths))
        if isinstance(layer.ffn, Experts):
            values = sum(widths) + 4 * max(widths)
        most = max(most, 16 * max(widths) ** 2 + 4 * tokens * values + 28 * max(matrices.values()))
    # Both models have all streams of every token.
    most += 8 * tokens * (spec.streams - 1) * spec.hidden
    if plan.source != OWN_TEXT:
        return most
    row_bytes = 8 * plan.length * sum(mixer.kv_heads * mixer.head_dim for _, mixer in spec.cached)
    return max(most, writing_bytes(parameters, rows=plan.rows, row_bytes=row_bytes, vocab=spec.vocab))


def measure_seconds(outline: Outline, plan: Plan) -> float:
    """Return about how long writing would take in seconds, from quantizing a small sample on this machine."""
    sample = np.random.default_rng(0).standard_normal((256, 2048), dtype=np.float32)
    quantizing = 0.0
    rates: dict[Scheme, float] = {}
    for item in plan.items:
        if isinstance(item, Quantized) and item.scheme.algorithm != KEPT:
            if item.scheme not in rates:
                run = quantizer(item.scheme.algorithm)
                run(sample, item.scheme)  # the first run pays for what later ones find ready
                began = time.perf_counter()
                run(sample, item.scheme)
                rates[item.scheme] = (time.perf_counter() - began) / sample.size
            quantizing += rates[item.scheme] * item.rows * item.inputs
    # Reading and writing at the speed of a common disk, and starting.
    moving = outline.checkpoint_bytes / 1.5e9 + outline.output_bytes / 1e9
    # Loading the model and letting it read, where its cache has to be measured.
    reading = 2.0 + outline.output_bytes / 1.5e8 if outline.kv_cache.startswith("int8") else 0.0
    return 2.0 + quantizing / (physical_cores() or 1) + moving + reading + _calibrating_seconds(outline, plan)


def _calibrating_seconds(outline: Outline, plan: Plan) -> float:
    """Return about how long calibration would take, by the speed of a product in fp32 on this machine."""
    if outline.calibration is None:
        return 0.0
    tokens = outline.calibration.tokens
    weights, squares, fixed = 0.0, 0.0, 0
    for item in plan.items:
        if isinstance(item, Quantized) and item.parameters[0].startswith("layers."):
            # An expert sees a part of the tokens only.
            weights += item.rows * item.inputs * item.share
            if item in plan.calibrated:
                squares += item.inputs**2 * item.share * item.experts
                if item.share < 1:
                    # What does not depend on tokens: factors, and rounding one input after the other.
                    fixed += item.experts * item.inputs**3 + item.rows * item.inputs**2
    # The float model and the quantized one are computed; so are moments of the inputs, and their drift.
    work: float = 2 * tokens * (2 * weights + 2 * squares)
    if fast_integer_matmul():
        work *= 0.4  # by integers, as measured on small models; large ones gain more
    work += fixed
    if outline.calibration.source == OWN_TEXT:
        work += tokens * weights  # one step of decoding for each token, in batches, with packed weights
    side = 1024
    sample = np.ones((side, side), np.float32)
    sample @ sample
    began = time.perf_counter()
    for _ in range(3):
        sample @ sample
    rate = 3 * 2 * side**3 / (time.perf_counter() - began)
    # Attention, factors, rounding and smaller products take nearly as long again, as measured on several models.
    return 1.8 * work / rate
