"""Several residual streams, of which each layer computes one and predicts the others (AltUp)."""

from __future__ import annotations

import numpy as np

from ortlm.graph.builder import Builder, Shape, Value
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.norm import Residual, Selection, norm
from ortlm.spec import AltUp, Decoder

# What transformers takes for the least mean of squares.
LEAST = 1e-5


def spread(g: Builder, spec: Decoder, x: Value, weights: Parameters, shape: Shape) -> Value:
    """Return the streams [B, S, n · H] that begin with embeddings ``x`` [B, S, H]."""
    if spec.altup is None:
        return x
    streams = [x]
    for i in range(1, spec.altup.streams):
        [y] = linear(g, x, [f"altup_in{i}"], parameters=weights, module=f"altup.in_proj.{i}", shape=shape)
        streams.append(_as_large(g, y, x, shape))
    out = (*shape[:-1], spec.altup.streams * spec.hidden)
    return g.op("Concat", *streams, shape=out, name="/model/altup", axis=-1)


def gathered(g: Builder, spec: Decoder, x: Value, weights: Parameters, lead: Shape) -> Value:
    """Return the mean [B, S, H] of the streams ``x`` [B, S, n · H], brought to the size of the first one."""
    if spec.altup is None:
        return x
    count, shape = spec.altup.streams, (*lead, spec.hidden)
    first, *others = g.ops(
        "Split", [x, g.integers(*[spec.hidden] * count)],
        outputs=[(g.dtype, shape)] * count, name="/model/altup", attributes={"axis": -1},
    )  # fmt: skip
    total = first
    for i, other in enumerate(others, 1):
        [y] = linear(
            g, other, [f"altup_out{i}"], parameters=weights, module=f"altup.out_proj.{i}", shape=shape
        )
        total = g.op("Add", total, _as_large(g, y, first, shape), shape=shape, name="/model/altup")
    return g.op("Mul", total, g.number(1.0 / count), shape=shape, name="/model/altup")


def _as_large(g: Builder, x: Value, first: Value, shape: Shape) -> Value:
    """Return ``x`` [B, S, H] with the root mean square of ``first``."""
    path, one = "/model/altup/size", (*shape[:-1], 1)

    def size(y: Value) -> Value:
        # Squares of what fp16 holds may be beyond it.
        wide = y if g.dtype == "fp32" else g.cast(y, "fp32", shape, path)
        square = g.op("Mul", wide, wide, shape=shape, dtype="fp32", name=path)
        return g.op("ReduceMean", square, g.integers(-1), shape=one, dtype="fp32", name=path, keepdims=1)

    least = g.op("Max", size(x), g.number(LEAST, "fp32"), shape=one, dtype="fp32", name=path)
    ratio = g.op("Div", size(first), least, shape=one, dtype="fp32", name=path)
    ratio = g.op("Sqrt", ratio, shape=one, dtype="fp32", name=path)
    ratio = ratio if g.dtype == "fp32" else g.cast(ratio, g.dtype, one, path)
    return g.op("Mul", x, ratio, shape=shape, name=path)


class Streams:
    """All residual streams around one layer.

    What goes into a layer is in ``inner``: its own stream, as predicted from all. ``corrected`` takes what it has
    become.
    """

    def __init__(
        self, g: Builder, spec: AltUp, x: Value, shape: Shape, weights: Parameters, layer: int
    ) -> None:
        self._g, self._spec, self._weights = g, spec, weights
        self._at, self._module = f"layers.{layer}", f"layers.{layer}.altup"
        self._path, self._layer = node_path(self._module), layer
        self._lead, self._hidden = tuple(shape[:-1]), int(shape[-1])
        self._all = self._predicted(x)
        self.inner = Residual(g, self._own(), shape, weights)

    def keep(self, select: Selection) -> None:
        """Keep only the positions that ``select`` returns, of what the layer does not see."""
        n = self._spec.streams
        x, self._lead = self.total(), select.lead
        self._all = self._apart(select(x, n * self._hidden, self._path))

    def corrected(self, x: Value) -> None:
        """Take ``x`` [B, S, H] for what the layer has made of its stream, and correct all streams by it."""
        g, n, lead, path = self._g, self._spec.streams, self._lead, self._path
        shape = (*lead, self._hidden)
        off = g.op("Sub", x, self._own(), shape=shape, name=path)
        off = g.op("Unsqueeze", off, g.integers(2), shape=(*lead, 1, self._hidden), name=path)
        [c] = linear(
            g, self._modalities(x), [f"{self._at}.altup_correct"],
            parameters=self._weights, module=f"{self._module}.correct", shape=(*lead, n), layer=self._layer,
        )  # fmt: skip
        c = g.op("Add", c, g.number(1.0), shape=(*lead, n), name=path)
        c = g.op("Unsqueeze", c, g.integers(3), shape=(*lead, n, 1), name=path)
        off = g.op("Mul", off, c, shape=(*lead, n, self._hidden), name=path)
        self._all = g.op("Add", self._all, off, shape=(*lead, n, self._hidden), name=path)

    def scaled(self) -> Value:
        """Return the layer's own stream [B, S, H], times learned numbers if there are some."""
        x = self._own()
        if self._spec.scaled:
            scale = self._g.weight(self._weights[f"{self._at}.altup_scale.weight"])
            x = self._g.op("Mul", x, scale, shape=(*self._lead, self._hidden), name=self._path)
        return x

    def add(self, branch: Value) -> None:
        """Add ``branch`` [B, S, H] to all streams but the first."""
        g, n = self._g, self._spec.streams
        shape = (*self._lead, n, self._hidden)
        y = g.op("Unsqueeze", branch, g.integers(2), shape=(*self._lead, 1, self._hidden), name=self._path)
        which = np.ones((n, 1), np.float32)
        which[0] = 0
        others = g.cast(g.constant(which, "altup.others"), g.dtype, (n, 1), self._path)
        y = g.op("Mul", y, others, shape=shape, name=self._path)
        self._all = g.op("Add", self._all, y, shape=shape, name=self._path)

    def total(self) -> Value:
        """Return all streams [B, S, n · H]."""
        wide = self._spec.streams * self._hidden
        return self._g.op(
            "Reshape", self._all, self._g.integers(0, 0, wide), shape=(*self._lead, wide), name=self._path
        )

    def _predicted(self, x: Value) -> Value:
        g, n, lead, path = self._g, self._spec.streams, self._lead, self._path
        self._all = before = self._apart(x)
        [c] = linear(
            g, self._modalities(self._own()), [f"{self._at}.altup_predict"],
            parameters=self._weights, module=f"{self._module}.predict", shape=(*lead, n), layer=self._layer,
        )  # fmt: skip
        c = g.op("Reshape", c, g.integers(0, 0, n, n), shape=(*lead, n, n), name=path)
        shape = (*lead, n, self._hidden)
        return g.op("Add", before, g.op("MatMul", c, before, shape=shape, name=path), shape=shape, name=path)

    def _modalities(self, x: Value) -> Value:
        g, shape = self._g, (*self._lead, self._hidden)
        x = norm(
            g, x, self._spec.norm, f"{self._at}.altup_norm",
            parameters=self._weights, module=f"{self._module}.norm", shape=shape,
        )  # fmt: skip
        x = g.op("Mul", x, g.number(1.0 / self._hidden), shape=shape, name=self._path)
        [x] = linear(
            g, x, [f"{self._at}.altup_router"],
            parameters=self._weights, module=f"{self._module}.router", shape=shape, layer=self._layer,
        )  # fmt: skip
        return g.op("Tanh", x, shape=(*self._lead, self._spec.streams), name=self._path)

    def _apart(self, x: Value) -> Value:
        n = self._spec.streams
        return self._g.op(
            "Reshape", x, self._g.integers(0, 0, n, self._hidden),
            shape=(*self._lead, n, self._hidden), name=self._path,
        )  # fmt: skip

    def _own(self) -> Value:
        active = self._g.integer(self._spec.active)
        return self._g.op(
            "Gather", self._all, active, shape=(*self._lead, self._hidden), name=self._path, axis=2
        )
