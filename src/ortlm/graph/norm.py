"""Normalization, alone or fused with the addition of a branch to the residual stream."""

from __future__ import annotations

from ortlm.graph.builder import MICROSOFT, Builder, Shape, Value
from ortlm.graph.linear import Parameters, node_path
from ortlm.spec import Norm


def norm(
    g: Builder, x: Value, spec: Norm, name: str, *, parameters: Parameters, module: str, shape: Shape
) -> Value:
    """Normalize ``x`` over its last axis with the weights ``name``."""
    weight = g.weight(parameters[f"{name}.weight"])
    path = node_path(module)
    if spec.kind == "rms":
        return g.op("RMSNormalization", x, weight, shape=shape, name=path, axis=-1, epsilon=spec.eps)
    bias = g.weight(parameters[f"{name}.bias"]) if spec.bias else None
    return g.op("LayerNormalization", x, weight, bias, shape=shape, name=path, axis=-1, epsilon=spec.eps)


def unit_norm(g: Builder, x: Value, spec: Norm, width: int, *, module: str, shape: Shape) -> Value:
    """Normalize ``x`` over its last axis of ``width`` channels, without weights."""
    ones = g.op("Expand", g.number(1.0), g.integers(width), shape=(width,), name=node_path(module))
    kind = "RMSNormalization" if spec.kind == "rms" else "LayerNormalization"
    return g.op(kind, x, ones, shape=shape, name=node_path(module), axis=-1, epsilon=spec.eps)


class Residual:
    """The residual stream: what it holds, and the branch that is still to be added to it.

    Leaving the addition open lets the next norm do it in one fused operator.
    """

    def __init__(self, g: Builder, x: Value, shape: Shape, parameters: Parameters) -> None:
        self._g, self._stream = g, x
        self._open: Value | None = None
        self.shape: tuple[int | str, ...] = tuple(shape)
        self._parameters = parameters

    def add(self, branch: Value, *, scale: float, module: str) -> None:
        """Add ``scale · branch`` to the stream, later."""
        if scale != 1.0:
            branch = self._g.op(
                "Mul", branch, self._g.number(scale), shape=self.shape, name=node_path(module)
            )
        self._settle(module)
        self._open = branch

    def normed(self, spec: Norm | None, name: str, *, module: str) -> Value:
        """Return the stream normalized by ``spec``, or as it is if None."""
        g = self._g
        if spec is None or self._open is None:
            self._settle(module)
            if spec is None:
                return self._stream
            return norm(
                g, self._stream, spec, name, parameters=self._parameters, module=module, shape=self.shape
            )
        weight = g.weight(self._parameters[f"{name}.weight"])
        kind = "SkipSimplifiedLayerNormalization" if spec.kind == "rms" else "SkipLayerNormalization"
        bias = g.weight(self._parameters[f"{name}.bias"]) if spec.bias else None
        out, _, _, total = g.ops(
            kind,
            [self._stream, self._open, weight, bias],
            outputs=[(g.dtype, self.shape), None, None, (g.dtype, self.shape)],
            name=node_path(module),
            domain=MICROSOFT,
            attributes={"epsilon": spec.eps},
        )
        self._stream, self._open = total, None
        return out

    def replace(self, x: Value, shape: Shape) -> None:
        """Go on with ``x`` instead."""
        self._stream, self._open, self.shape = x, None, tuple(shape)

    def multiply(self, factor: Value, module: str) -> None:
        """Multiply the stream, with every branch added, by ``factor``, one number."""
        total = self.total(module)
        self._stream = self._g.op("Mul", total, factor, shape=self.shape, name=f"{node_path(module)}/scale")

    def total(self, module: str) -> Value:
        """Return the stream with every branch added."""
        self._settle(module)
        return self._stream

    def keep(self, select: Selection, module: str) -> None:
        """Keep only the positions that ``select`` returns."""
        self._settle(module)
        self._stream = select(self._stream, int(self.shape[-1]), node_path(module))
        self.shape = (*select.lead, self.shape[-1])

    def _settle(self, module: str) -> None:
        if self._open is not None:
            self._stream = self._g.op(
                "Add", self._stream, self._open, shape=self.shape, name=node_path(module)
            )
            self._open = None


class Selection:
    """Picks positions out of [B, S, n]; ``indices`` int64 [B, count, 1]."""

    lead: tuple[str, str] = ("batch_size", "kept")

    def __init__(self, g: Builder, indices: Value) -> None:
        self._g, self._indices = g, indices

    def __call__(self, x: Value, width: int, path: str) -> Value:
        """Return the chosen rows of ``x`` as [B, count, width]."""
        return self._g.op(
            "GatherND", x, self._indices, shape=(*self.lead, width), name=f"{path}/keep", batch_dims=1
        )


class FlatSelection(Selection):
    """The same with ``indices`` int64 [B, count] into all positions of all rows, one row after the other.

    CUDA's GatherND copies sizes from main memory in every run, which captured runs cannot do.
    """

    def __call__(self, x: Value, width: int, path: str) -> Value:
        """Return the chosen rows of ``x`` as [B, count, width]."""
        g, path = self._g, f"{path}/keep"
        flat = g.op("Reshape", x, g.integers(-1, width), shape=("positions", width), name=path)
        return g.op("Gather", flat, self._indices, shape=(*self.lead, width), name=path, axis=0)
