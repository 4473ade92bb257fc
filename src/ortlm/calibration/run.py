"""Calibration from the first layer to the head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm._utils.cpu import fast_integer_matmul
from ortlm._utils.progress import Progress
from ortlm.calibration.integer_moments import IntegerMoments
from ortlm.calibration.layer_quantizer import LayerQuantizer, Results
from ortlm.calibration.progress_state import CalibrationProgress
from ortlm.dtypes import Floats
from ortlm.graph.builder import Product
from ortlm.graph.weight_plan import Plan, Quantized
from ortlm.layerwise.model import LayerwiseModel
from ortlm.layerwise.per_layer_inputs import LookedUp
from ortlm.quant.algorithms import CALIBRATED, KEPT, quantizer
from ortlm.quant.gptq import moments
from ortlm.quant.recipe import Calibration
from ortlm.quant.rtn import Packed, dequantize
from ortlm.quant.scheme import Scheme
from ortlm.runtime.engine.huge_pages import give_back_at_once
from ortlm.weights.reader import Weights
from ortlm.weights.writer import Layout, write_packed, write_values


def calibrate(
    state: CalibrationProgress,
    plan: Plan,
    layout: Layout,
    weights: Weights,
    rows: Sequence[NDArray[np.int64]],
    settings: Calibration,
    *,
    threads: int,
    progress: Progress,
) -> None:
    """Find the codes of everything in ``plan`` that is to be calibrated, and write them to ``state.data``.

    Layer by layer: each is calibrated on what the quantized layers before it make of ``rows``. Where
    ``settings.correct``, the float model runs too, so that errors so far are compensated for. One layer's float
    weights, moments of its inputs, and the states of all rows are in memory.
    """
    spec = weights.spec
    integer = fast_integer_matmul()
    methods = [CALIBRATED[item.scheme.algorithm] for item in plan.calibrated]
    # Scales that move from inputs into weights would be in one of the two models only.
    paired = integer and not any(method.equalizes for method in methods)
    model = LayerwiseModel(weights, threads=threads, integer=paired)
    by_integers = IntegerMoments(threads=threads) if integer else None
    moments_of = by_integers or moments
    counts = [_matrices(plan, index) for index in range(len(spec.layers))]
    progress.start("calibrating", sum(counts), "matrices", done=sum(counts[: state.done]))
    with contextlib.ExitStack() as stack:
        stack.enter_context(give_back_at_once())
        stack.callback(model.close)
        if by_integers is not None:
            stack.callback(by_integers.close)
        streams = [model.embed(rows, change=_looked_up(plan, weights))]
        if settings.correct:
            streams.append(model.embed(rows, alongside=True))
        if state.resumed and state.done:
            streams = state.streams()
        for index in range(state.done, len(spec.layers)):
            layer = LayerQuantizer(plan, weights, settings, threads=threads, moments_of=moments_of)
            floats = streams[1] if settings.correct else None
            counted = _Counted(layer, counts[index], progress)
            streams = list(model.layer(index, streams[0], counted, floats))
            _write(state, layout, layer.results)
            state.experts |= layer.experts
            state.finish(index + 1, streams)
            counted.finish()
        head = _head(plan)
        if head is not None:
            last = LayerQuantizer(plan, weights, settings, threads=threads, moments_of=moments_of)
            floats = model.head_inputs(streams[1]) if settings.correct else None
            last.head(model.head_inputs(streams[0]), floats, head)
            _write(state, layout, last.results)


class _Counted:
    """Tells how many of a layer's matrices are done, so that the time left is known before its end."""

    def __init__(self, layer: LayerQuantizer, count: int, progress: Progress) -> None:
        self._layer, self._left, self._progress = layer, count, progress

    def __call__(
        self, product: Product, inputs: list[Floats], floats: list[Floats] | None, weight: Floats
    ) -> Floats:
        changed = self._layer(product, inputs, floats, weight)
        # The last one counts when the layer is finished.
        if self._left > 1:
            self._left -= 1
            self._progress.advance(1)
        return changed

    def finish(self) -> None:
        """Count what is left: experts, of which each is a matrix."""
        self._progress.advance(self._left)


def _matrices(plan: Plan, index: int) -> int:
    """Return how many matrices of layer ``index`` are quantized, at least 1."""
    at = f"layers.{index}."
    return max(1, sum(isinstance(i, Quantized) and i.parameters[0].startswith(at) for i in plan.items))


def _looked_up(plan: Plan, weights: Weights) -> dict[str, LookedUp]:
    """Return what becomes of weights that tokens look up, row by row, by name."""
    found: dict[str, LookedUp] = {}
    for item in plan.items:
        # What is carried over is what the checkpoint says.
        if isinstance(item, Quantized) and item.scheme.algorithm != KEPT:
            for name in item.parameters:
                if weights.parameters[name].role in ("embed", "per_layer_embed"):
                    found[name] = functools.partial(_rounded, scheme=item.scheme)
    return found


def _rounded(rows: Floats, scheme: Scheme) -> Floats:
    return dequantize(quantizer(scheme.algorithm)(rows, scheme), scheme, rows.shape[1])


def _head(plan: Plan) -> Quantized | None:
    """Return the head if it has to be calibrated. One that is tied to the embeddings is rounded as they are."""
    for item in plan.items:
        if (
            isinstance(item, Quantized)
            and item.parameters == ("head.weight",)
            and item.scheme.algorithm in CALIBRATED
        ):
            return item
    return None


def _write(state: CalibrationProgress, layout: Layout, results: Results) -> None:
    for (item, start), result in results.items():
        if isinstance(result, Packed):
            assert isinstance(item, Quantized)
            write_packed(state.data, item, layout, result, start)
        else:
            assert not isinstance(item, Quantized)
            write_values(state.data, item, layout, result)
