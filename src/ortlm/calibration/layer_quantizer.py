"""Quantizes a model layer after layer, each on what the layers before it, as quantized, give to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ortlm.dtypes import Floats
from ortlm.errors import BadCheckpoint
from ortlm.graph.builder import Product
from ortlm.graph.weight_plan import Plain, Plan, Quantized
from ortlm.quant.algorithms import CALIBRATED, KEPT, Calibrated, quantizer
from ortlm.quant.awq import channel_scales
from ortlm.quant.gptq import Feedback, Moments, corrected, feedback, gptq, moments
from ortlm.quant.recipe import Calibration
from ortlm.quant.rtn import Packed, clip_search, clipped_range, dequantize, stored
from ortlm.quant.scheme import Scheme
from ortlm.spec import Attention, GatedMLP, ShortConv
from ortlm.weights.reader import Weights

# Computes the moments of inputs [..., K], and of how far those of the float model are from them.
MomentsOf = Callable[[Sequence[Floats], Sequence[Floats] | None], Moments]
# What to write of each stored tensor, from which of its rows on.
Results = dict[tuple[Quantized | Plain, int], Packed | Floats]

# Elements of a matrix that are rounded at once; more would only take more memory.
_CHUNK = 1 << 25
# Rounding to 8 bits loses little, and the moments of so many inputs take more time and memory than all the rest.
_WIDE = 4096
# An expert is calibrated if at least so many tokens chose it for each of its inputs: from fewer, what inputs have
# in common cannot be told from chance.
_ENOUGH = 0.25
# Elements whose ranges one core looks for at once.
_PIECE = 1 << 22


class LayerQuantizer:
    """Finds the codes of one layer's matrices while ``LayerwiseModel`` computes it.

    ``plan`` says what is stored and how. After a layer, ``results`` holds what has to be written: packed matrices,
    and float weights that scales were moved into; ``experts`` has for each expert's matrix whether it was
    calibrated, or only rounded because too few tokens chose that expert. ``moments_of`` computes the moments of
    inputs.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        settings: Calibration,
        *,
        threads: int,
        moments_of: MomentsOf = moments,
    ) -> None:
        self._quantized = {
            name: item for item in plan.items if isinstance(item, Quantized) for name in item.parameters
        }
        self._plain = {
            name: item for item in plan.items if isinstance(item, Plain) for name in item.parameters
        }
        self._weights, self._settings, self._threads = weights, settings, threads
        self._moments_of = moments_of
        self.results: Results = {}
        self.experts: dict[str, bool] = {}

    def __call__(
        self, product: Product, inputs: list[Floats], floats: list[Floats] | None, weight: Floats
    ) -> Floats:
        """Quantize ``weight`` for these ``inputs`` and return what it has become."""
        if self._weights.parameters[product.parameters[0]].expert is not None:
            return self._expert(product, inputs, weight)
        items = [item for _, _, item in self._parts(product) if item is not None]
        methods = [self._method(item) for item in items]
        if any(m is not None and m.equalizes for m in methods):
            weight = self._equalize(product, items[0].scheme, inputs, floats, weight)
        known = self._seen(product, inputs, floats, methods)
        done = []
        for start, stop, item in self._parts(product):
            rows = weight[start:stop]
            # What is carried over is what the float model has.
            if item is not None and item.scheme.algorithm != KEPT:
                packed = self._pack(rows, item, known)
                self.results[item, 0] = packed
                rows = dequantize(packed, item.scheme, item.inputs)
            done.append(rows)
        return np.concatenate(done) if len(done) > 1 else done[0]

    def _expert(self, product: Product, inputs: list[Floats], weight: Floats) -> Floats:
        """Quantize one expert's ``weight`` and return what it has become.

        Other tokens chose it in the float model, so that nothing is known of their difference.
        """
        first = self._weights.parameters[product.parameters[0]]
        item = self._quantized.get(first.name)
        if item is None or item.scheme.algorithm == KEPT:
            return weight
        method, turns = self._method(item), item.interleaved
        enough = sum(len(x) for x in inputs) >= _ENOUGH * item.inputs
        known = self._seen(product, inputs, None, [method]) if enough else None
        if method is not None:
            self.experts |= dict.fromkeys(product.parameters, enough)
        rows = weight.reshape(turns, -1, item.inputs).swapaxes(0, 1).reshape(weight.shape)
        packed = self._pack(rows, item, known)
        # One item may hold all experts of a layer.
        self.results[item, item.parameters.index(first.name) * len(rows)] = packed
        rows = dequantize(packed, item.scheme, item.inputs)
        return rows.reshape(-1, turns, item.inputs).swapaxes(0, 1).reshape(weight.shape)

    def _seen(
        self,
        product: Product,
        inputs: list[Floats],
        floats: list[Floats] | None,
        methods: Sequence[Calibrated | None],
    ) -> Moments | Feedback | None:
        """Return what ``methods`` have to know of a product's inputs."""
        if not any(methods):
            return None
        seen = self._moments_of(inputs, floats)
        if not np.isfinite(np.diagonal(seen.second)).all():
            raise BadCheckpoint(
                f"what {product.parameters[0]} is multiplied by becomes infinite while the model reads the "
                "calibration text: the checkpoint is damaged or training diverged."
            )
        if any(m is not None and m.feeds_back for m in methods):
            rows = sum(self._weights.parameters[name].shape[0] for name in product.parameters)
            return feedback(seen, damping=self._settings.damping, rows=rows)
        return seen

    def head(self, states: Sequence[Floats], floats: Sequence[Floats] | None, item: Quantized) -> None:
        """Quantize the head, which is multiplied by ``states`` [B, S, H], a part of its rows at a time.

        ``floats`` are those of the float model.
        """
        seen = self._moments_of(states, floats)
        carry = feedback(seen, damping=self._settings.damping, rows=item.rows)
        stack = self._weights.stack(item.parameters)
        step = max(1, _CHUNK // item.inputs)
        parts = [
            self._pack(stack.rows(a, min(a + step, item.rows)), item, carry)
            for a in range(0, item.rows, step)
        ]
        self.results[item, 0] = _joined(parts)

    def _parts(self, product: Product) -> Iterator[tuple[int, int, Quantized | None]]:
        """Yield the stored matrices that make up a product, with the rows [start, stop) that they have in it."""
        at, seen = 0, None
        for name in product.parameters:
            item = self._quantized.get(name)
            rows = self._weights.parameters[name].shape[0]
            if item is None:
                yield at, at + rows, None
            elif item is not seen:
                # What is stored together is together here too: the other way round it may be apart.
                yield at, at + item.rows, item
            at, seen = at + rows, item

    def _pack(self, rows: Floats, item: Quantized, known: Moments | Feedback | None) -> Packed:
        scheme, method = item.scheme, self._method(item)
        if method is None or known is None:
            return self._in_pieces(rows, lambda part: quantizer(scheme.algorithm)(part, scheme))
        importance = known.importance
        if not method.feeds_back or not isinstance(known, Feedback):
            return self._in_pieces(rows, lambda part: clip_search(part, scheme, importance))
        done = []
        step = max(1, _CHUNK // item.inputs)
        for a in range(0, len(rows), step):
            part = rows[a : a + step]
            if self._settings.correct:
                part = corrected(part, known)
            scales, zeros = self._ranges(part, scheme, importance)
            # With 8 bits rounding loses next to nothing.
            sweeps = self._settings.sweeps if scheme.bits < 8 else 0
            done.append(gptq(part, scheme, known, stored(scales, scheme), zeros, sweeps=sweeps))
        return _joined(done)

    @staticmethod
    def _method(item: Quantized) -> Calibrated | None:
        """Return how ``item`` is calibrated, None if it is only rounded."""
        if item.scheme.bits == 8 and item.inputs > _WIDE:
            return None
        return CALIBRATED.get(item.scheme.algorithm)

    def _in_pieces(self, rows: Floats, pack: Callable[[Floats], Packed]) -> Packed:
        with ThreadPoolExecutor(self._threads) as pool:
            return _joined(list(pool.map(pack, _pieces(rows))))

    def _ranges(self, rows: Floats, scheme: Scheme, importance: Floats) -> tuple[Floats, Floats]:
        with ThreadPoolExecutor(self._threads) as pool:
            ranges = list(pool.map(lambda part: clipped_range(part, scheme, importance), _pieces(rows)))
        return np.concatenate([s for s, _ in ranges]), np.concatenate([z for _, z in ranges])

    # --- equalization ---------------------------------------------------------------------------------------

    def _equalize(
        self,
        product: Product,
        scheme: Scheme,
        inputs: list[Floats],
        floats: list[Floats] | None,
        weight: Floats,
    ) -> Floats:
        """Move scales of the inputs of ``weight`` into the weights before it, where that is possible."""
        before = self._before(product)
        if before is None or any(
            item is None or item.scheme.algorithm == KEPT for _, _, item in self._parts(product)
        ):
            return weight
        scales = channel_scales(weight, scheme, moments(inputs))
        name, shared = before
        shrink = scales
        if shared is not None:
            # Several inputs come from one row: what serves them in the middle serves all.
            middle = np.exp(np.log(scales).reshape(shared).mean(axis=1, keepdims=True))
            shrink = middle.reshape(-1).astype(np.float32)
            scales = np.broadcast_to(middle, shared).reshape(-1).astype(np.float32)
        if not self._divide(name, shrink):
            return weight
        for x in inputs:
            x /= scales
        # The float model continues with its own.
        for i, f in enumerate(floats or ()):
            assert floats is not None
            floats[i] = f / scales
        return weight * scales

    def _before(self, product: Product) -> tuple[str, tuple[int, ...] | None] | None:
        """Return whose output the inputs of ``product`` are, channel by channel, and how those are shared.

        Attention hands each channel of a value to several heads: (key/value heads, heads of each, head size).
        None where scales cannot move there.
        """
        first = self._weights.parameters[product.parameters[0]]
        assert first.layer is not None
        at, role = f"layers.{first.layer}", first.part
        layer = self._weights.spec.layers[first.layer]
        # Others have several maps of the same norm, and all would have to be scaled back.
        if role == "q" and layer.laurel is not None:
            return None
        if role == "q" or (role == "in" and isinstance(layer.mixer, ShortConv)):
            return (f"{at}.mixer_pre", None) if layer.mixer_pre is not None and not layer.parallel else None
        if role in ("gate", "up"):
            return (f"{at}.ffn_pre", None) if layer.ffn_pre is not None and not layer.parallel else None
        if role == "o":
            mixer = layer.mixer
            if not isinstance(mixer, Attention) or mixer.v_norm is not None:
                return None
            if mixer.shared is not None or first.layer in self._weights.spec.sharing:
                return None  # several layers read those values
            return f"{at}.v", (mixer.kv_heads, mixer.heads // mixer.kv_heads, mixer.head_dim)
        if role == "down":
            return (f"{at}.up", None) if isinstance(layer.ffn, GatedMLP) else None
        return None

    def _divide(self, name: str, scales: Floats) -> bool:
        """Divide the outputs of the norm or matrix ``name`` by ``scales``; False if they cannot be changed."""
        if f"{name}.weight" in self._plain and self._plain[f"{name}.weight"].parameters == (
            f"{name}.weight",
        ):
            for kind in ("weight", "bias"):
                vector = self._plain.get(f"{name}.{kind}")
                if vector is not None:
                    value: Floats = self._weights.read(vector.parameters)
                    if value.ndim > 1:
                        return False
                    self.results[vector, 0] = value / scales
            return True
        item = self._quantized.get(f"{name}.weight")
        packed = self.results.get((item, 0)) if item is not None else None
        if item is None or not isinstance(packed, Packed) or f"{name}.bias" in self._weights.parameters:
            return False
        start = 0
        for other in item.parameters:
            if other == f"{name}.weight":
                break
            start += self._weights.parameters[other].shape[0]
        # A row's scales take what the whole row is multiplied by: its codes stay.
        packed.scales[start : start + len(scales)] /= scales[:, None]
        return True


def _pieces(rows: Floats) -> list[Floats]:
    step = max(1, _PIECE // rows.shape[1])
    return [rows[a : a + step] for a in range(0, len(rows), step)]


def _joined(parts: Sequence[Packed]) -> Packed:
    if len(parts) == 1:
        return parts[0]
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return Packed(
        np.concatenate([p.values for p in parts]),
        np.concatenate([p.scales for p in parts]),
        np.concatenate(zeros) if zeros else None,
    )
