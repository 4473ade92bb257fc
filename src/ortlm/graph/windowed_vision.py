"""One image of any size to embeddings: layers that attend within windows of it, and squares of patches joined."""

from __future__ import annotations

import numpy as np

from ortlm.graph.builder import MICROSOFT, Attribute, Builder, Shape, Value
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.mlp import activate
from ortlm.graph.norm import Residual
from ortlm.spec import Merged, WindowedEncoder

_PATH = "/vision"


class _Windows:
    """Where the patches of one image are; ``grid`` int64 [1, 3] has its frames, rows and columns of patches.

    Patches come square by square of ``merge`` by ``merge``, row by row of squares. They are computed in the order
    of windows, row by row of those, and within each in the same way. All values are int64. ``order`` [squares]:
    which square comes at each place; ``places`` [squares] the inverse. ``lengths`` int32 [windows]: how many
    patches a window has. ``padded`` [windows, most]: the places of its patches, in the order of windows, then
    those of any others. ``back`` [patches]: where each patch is in [windows · most].
    """

    def __init__(self, g: Builder, spec: WindowedEncoder, grid: Value) -> None:
        self._g = g
        merge, side = spec.merge, spec.window
        self.square, self.most = merge * merge, side * side * merge * merge
        rows, columns = (self._number(grid, axis) for axis in (1, 2))
        self._size = self._op("Mul", rows, columns, shape=())
        high = self._op("Div", rows, g.integer(merge), shape=())
        wide = self._op("Div", columns, g.integer(merge), shape=())
        down, across = self._ceil(high, side), self._ceil(wide, side)

        # Every place of every window, those over the edges too.
        windows: Shape = ("places",)
        count = self._op("Mul", down, across, shape=())
        total = self._op("Mul", count, g.integer(side * side), shape=())
        place = self._op("Range", g.integer(0), total, g.integer(1), shape=windows)
        window = self._op("Div", place, g.integer(side * side), shape=windows)
        inner = self._op("Mod", place, g.integer(side * side), shape=windows)
        row = self._sum(self._op("Div", window, across, shape=windows), side, inner, "Div")
        column = self._sum(self._op("Mod", window, across, shape=windows), side, inner, "Mod")
        there = self._op("And", self._less(row, high), self._less(column, wide), of="bool", shape=windows)
        found = self._op("NonZero", there, shape=(1, "squares"))
        found = self._op("Squeeze", found, g.integers(0), shape=("squares",))
        square = self._op("Add", self._op("Mul", row, wide, shape=windows), column, shape=windows)
        self.order = self._op("Gather", square, found, shape=("squares",), axis=0)
        numbers = self._numbers(self.order, "squares")
        self.places = self._op("ScatterElements", self.order, self.order, numbers, shape=("squares",), axis=0)

        # The squares of a window are next to each other, and so begin where the windows before it end.
        each = g.cast(there, "int64", windows, _PATH)
        each = self._op("Reshape", each, g.integers(-1, side * side), shape=("windows", side * side))
        squares = self._op("ReduceSum", each, g.integers(1), shape=("windows", 1), keepdims=1)
        before = self._op("CumSum", squares, g.integer(0), shape=("windows", 1), exclusive=1)
        steps = g.constant(np.arange(side * side, dtype=np.int64)[None], f"{_PATH}/steps")
        wide_shape: Shape = ("windows", side * side)
        real = self._op("Less", steps, squares, of="bool", shape=wide_shape)
        at = self._op("Where", real, steps, g.integer(0), shape=wide_shape)
        at = self._op("Add", at, before, shape=wide_shape)
        patches = self._patches(at, ("windows", side * side))
        self.padded = self._op("Reshape", patches, g.integers(-1, self.most), shape=("windows", self.most))
        lengths = self._op("Squeeze", squares, g.integers(1), shape=("windows",))
        lengths = self._op("Mul", lengths, g.integer(self.square), shape=("windows",))
        self.lengths = g.cast(lengths, "int32", ("windows",), _PATH)
        flat = self._op("Reshape", real, g.integers(-1), of="bool", shape=windows)
        back = self._op("NonZero", flat, shape=(1, "squares"))
        back = self._op("Squeeze", back, g.integers(0), shape=("squares",))
        self.back = self._op("Reshape", self._patches(back, ("squares",)), g.integers(-1), shape=("patches",))

        #: Which patch comes at each place, and where in the image it is.
        self.first = self._op(
            "Reshape", self._patches(self.order, ("squares",)), g.integers(-1), shape=("patches",)
        )
        within = self._op("Mod", self.first, g.integer(self.square), shape=("patches",))
        square = self._op("Div", self.first, g.integer(self.square), shape=("patches",))
        self.row = self._place(self._op("Div", square, wide, shape=("patches",)), merge, within, "Div")
        self.column = self._place(self._op("Mod", square, wide, shape=("patches",)), merge, within, "Mod")

    def sized(self, pixels: Value, inputs: int) -> Value:
        """Return ``pixels`` of as many patches as the grid says, or fail when that is another number."""
        g = self._g
        size = self._op("Unsqueeze", self._size, g.integers(0), shape=(1,))
        size = self._op("Concat", size, g.integers(inputs), shape=(2,), axis=0)
        return g.op("Reshape", pixels, size, shape=("patches", inputs), name=_PATH)

    def _patches(self, squares: Value, shape: Shape) -> Value:
        """Return the patches of ``squares``, with one axis more."""
        g, out = self._g, (*shape, self.square)
        x = self._op("Unsqueeze", squares, g.integers(len(shape)), shape=(*shape, 1))
        x = self._op("Mul", x, g.integer(self.square), shape=(*shape, 1))
        inside = g.constant(np.arange(self.square, dtype=np.int64), f"{_PATH}/square")
        return self._op("Add", x, inside, shape=out)

    def _number(self, grid: Value, axis: int) -> Value:
        g = self._g
        # There must be one image: nothing else has one element.
        x = self._op("Gather", grid, g.integer(axis), shape=("images",), axis=1)
        return self._op("Squeeze", x, g.integers(0), shape=())

    def _ceil(self, x: Value, by: int) -> Value:
        g = self._g
        return self._op("Div", self._op("Add", x, g.integer(by - 1), shape=()), g.integer(by), shape=())

    def _sum(self, window: Value, side: int, inner: Value, kind: str) -> Value:
        """Return row (Div) or column (Mod) of each place, by its window's and its own in that."""
        g, shape = self._g, ("places",)
        start = self._op("Mul", window, g.integer(side), shape=shape)
        return self._op("Add", start, self._op(kind, inner, g.integer(side), shape=shape), shape=shape)

    def _place(self, square: Value, merge: int, within: Value, kind: str) -> Value:
        g, shape = self._g, ("patches",)
        start = self._op("Mul", square, g.integer(merge), shape=shape)
        return self._op("Add", start, self._op(kind, within, g.integer(merge), shape=shape), shape=shape)

    def _numbers(self, like: Value, size: str) -> Value:
        g = self._g
        count = self._op("Shape", like, shape=(1,))
        count = self._op("Squeeze", count, shape=())
        return self._op("Range", g.integer(0), count, g.integer(1), shape=(size,))

    def _less(self, a: Value, b: Value) -> Value:
        return self._op("Less", a, b, of="bool", shape=("places",))

    def _op(
        self, kind: str, *inputs: Value, shape: Shape, of: str = "int64", **attributes: Attribute
    ) -> Value:
        return self._g.op(
            kind, *inputs, shape=shape, dtype=of, name=f"{_PATH}/windows", domain="", **attributes
        )


def windowed(
    g: Builder,
    spec: WindowedEncoder,
    projector: Merged,
    pixels: Value,
    grid: Value,
    weights: Parameters,
    hidden: int,
) -> Value:
    """Return the features [tokens, hidden] of the image whose patches are ``pixels`` [patches, inputs].

    ``grid``: see ``_Windows``. Tokens come row by row.
    """
    windows, wide = _Windows(g, spec, grid), spec.hidden
    x = windows.sized(pixels, spec.inputs)
    x = g.op("Gather", x, windows.first, shape=("patches", spec.inputs), name=_PATH, axis=0)
    shape: Shape = (1, "patches", wide)
    x = g.op("Unsqueeze", x, g.integers(0), shape=(1, "patches", spec.inputs), name=_PATH)
    x = g.product(
        x, [weights["vision.patches.weight"]], "vision.patches.weight", shape=shape, path=f"{_PATH}/patches"
    )
    turn = _Rotation(g, spec, windows)
    stream = Residual(g, x, shape, weights)
    for i in range(spec.layers):
        _layer(g, spec, stream, i, weights, turn, None if i in spec.whole else windows)
    x = stream.normed(projector.norm, "vision.join_norm", module="vision.join_norm")
    merged = wide * windows.square
    rows: Shape = ("squares", merged)
    x = g.op("Reshape", x, g.integers(-1, merged), shape=rows, name=f"{_PATH}/join")
    [x] = linear(g, x, ["vision.join1"], parameters=weights, module="vision.join1", shape=rows)
    x = activate(g, x, projector.act, shape=rows, path=f"{_PATH}/join")
    [x] = linear(g, x, ["vision.join2"], parameters=weights, module="vision.join2", shape=rows)
    return g.op("Gather", x, windows.places, shape=("num_image_tokens", hidden), name=_PATH, axis=0)


class _Rotation:
    """Rotates heads by the row and the column of each patch."""

    def __init__(self, g: Builder, spec: WindowedEncoder, windows: _Windows) -> None:
        self._g, self._heads, self._wide = g, spec.heads, spec.hidden
        path, half = f"{_PATH}/rotary_emb", len(spec.inv_freq)
        frequencies = g.constant(np.array([spec.inv_freq], np.float32), f"{path}.inv_freq")
        angles = []
        for at in (windows.row, windows.column):
            x = g.op("Unsqueeze", at, g.integers(1), shape=("patches", 1), dtype="int64", name=path)
            x = g.cast(x, "fp32", ("patches", 1), path)
            angles.append(g.op("Mul", x, frequencies, shape=("patches", half), dtype="fp32", name=path))
        both = g.op("Concat", *angles, shape=("patches", 2 * half), dtype="fp32", name=path, axis=1)
        tables = []
        for function in ("Cos", "Sin"):
            x = g.op(function, both, shape=("patches", 2 * half), dtype="fp32", name=path)
            tables.append(x if g.dtype == "fp32" else g.cast(x, g.dtype, ("patches", 2 * half), path))
        self._tables = tables
        count = g.op("Shape", windows.row, shape=(1,), dtype="int64", name=path)
        count = g.op("Squeeze", count, shape=(), dtype="int64", name=path)
        at = g.op("Range", g.integer(0), count, g.integer(1), shape=("patches",), dtype="int64", name=path)
        self._at = g.op("Unsqueeze", at, g.integers(0), shape=(1, "patches"), dtype="int64", name=path)

    def __call__(self, x: Value, path: str) -> Value:
        """Return ``x`` [1, patches, hidden], rotated."""
        return self._g.op(
            "RotaryEmbedding", x, self._at, *self._tables,
            shape=(1, "patches", self._wide), name=path, domain=MICROSOFT, num_heads=self._heads,
        )  # fmt: skip


def _layer(
    g: Builder,
    spec: WindowedEncoder,
    stream: Residual,
    i: int,
    weights: Parameters,
    turn: _Rotation,
    windows: _Windows | None,
) -> None:
    """Emit layer ``i``, which attends to the whole image if ``windows`` is None."""
    at, shape = f"vision.layers.{i}", stream.shape
    path = node_path(f"{at}.attn")
    x = stream.normed(spec.norm, f"{at}.mixer_pre", module=f"{at}.mixer_pre")
    q, k, v = linear(
        g, x, [f"{at}.{part}" for part in "qkv"],
        parameters=weights, module=f"{at}.attn.qkv_proj", shape=shape, layer=i, apart=True,
    )  # fmt: skip
    q, k = turn(q, f"{path}/q"), turn(k, f"{path}/k")
    if windows is None:
        y = g.op(
            "MultiHeadAttention", q, k, v, shape=shape, name=path, domain=MICROSOFT, num_heads=spec.heads
        )
    else:
        inner: Shape = ("windows", windows.most, spec.hidden)
        flat: Shape = ("patches", spec.hidden)
        parts = []
        for part in (q, k, v):
            x = g.op("Squeeze", part, g.integers(0), shape=flat, name=path)
            parts.append(g.op("Gather", x, windows.padded, shape=inner, name=path, axis=0))
        # A window's own patches come first; of the rest nobody reads anything.
        y = g.op(
            "MultiHeadAttention", *parts, None, windows.lengths,
            shape=inner, name=path, domain=MICROSOFT, num_heads=spec.heads,
        )  # fmt: skip
        y = g.op("Reshape", y, g.integers(-1, spec.hidden), shape=("places", spec.hidden), name=path)
        y = g.op("Gather", y, windows.back, shape=flat, name=path, axis=0)
        y = g.op("Unsqueeze", y, g.integers(0), shape=shape, name=path)
    [y] = linear(g, y, [f"{at}.o"], parameters=weights, module=f"{at}.attn.o_proj", shape=shape, layer=i)
    stream.add(y, scale=1.0, module=at)
    x = stream.normed(spec.norm, f"{at}.ffn_pre", module=f"{at}.ffn_pre")
    wide = (*shape[:-1], spec.ffn.intermediate)
    gate, up = linear(
        g, x, [f"{at}.gate", f"{at}.up"],
        parameters=weights, module=f"{at}.mlp.gate_up_proj", shape=shape, layer=i, apart=True,
    )  # fmt: skip
    y = activate(g, gate, spec.ffn.act, shape=wide, path=node_path(f"{at}.mlp"))
    y = g.op("Mul", y, up, shape=wide, name=node_path(f"{at}.mlp"))
    [y] = linear(g, y, [f"{at}.down"], parameters=weights, module=f"{at}.mlp.down_proj", shape=wide, layer=i)
    stream.add(y, scale=1.0, module=at)
