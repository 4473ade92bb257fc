"""Images to embeddings: a vision encoder over patches, and what joins it to the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ortlm.graph.builder import MICROSOFT, Attribute, Builder, Shape, Value
from ortlm.graph.decoder import Emitted
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.mlp import activate
from ortlm.graph.norm import Residual
from ortlm.graph.windowed_vision import windowed
from ortlm.quant.recipe import Recipe
from ortlm.spec import Encoder, Merged, Pooled, Tiles, Vision, WindowedEncoder, vision_parameters
from ortlm.target import Target

_PATH = "/vision"


def emit_vision(
    vision: Vision, *, hidden: int, target: Target, dtype: str, recipe: Recipe, fast_prompts: bool = False
) -> Emitted:
    """Return the graph that turns images into embeddings of ``hidden`` channels.

    For ``Tiles``: ``pixel_values`` [images, crops, 3, side, side], the view of the whole first, padded with
    crops of anything, which are left out before they cost time; ``image_sizes`` int64 [images, 2], height
    and width of the crops side by side, in pixels; for a ``padded`` encoder also ``image_patches`` int64
    [images, 2], rows and columns of their patches that are no padding. For ``Pooled``: ``pixel_values``
    [images, 3, side, side].
    For a ``WindowedEncoder``, which takes one image at a time: ``pixel_values`` [patches, 3 · frames · pixels], in
    squares that become a token, and ``image_grid_thw`` int64 [1, 3], frames (1), rows and columns of patches.
    Output: ``image_features`` [tokens of all images, hidden]. With ``fast_prompts``, quantized matrices have
    8 bits by columns, for integer matmuls.
    """
    encoder, projector = vision.encoder, vision.projector
    g = Builder(
        target=target,
        dtype=dtype,
        recipe=recipe,
        layers=encoder.layers,
        name="vision",
        fast_prompts=fast_prompts,
    )
    weights: Parameters = {p.name: p for p in vision_parameters(vision, hidden)}
    inputs = {"pixel_values": "pixel_values"}
    if isinstance(encoder, WindowedEncoder):
        assert isinstance(projector, Merged)
        pixels = g.input("pixel_values", dtype, ("patches", encoder.inputs))
        thw = g.input("image_grid_thw", "int64", (1, 3))
        inputs["image_grid_thw"] = "image_grid_thw"
        features = windowed(g, encoder, projector, pixels, thw, weights, hidden)
        g.output(features, "image_features", ("num_image_tokens", hidden))
        return Emitted(g, inputs, {"image_features": "image_features"}, {})
    square = (3, encoder.side, encoder.side)
    if isinstance(projector, Tiles):
        pixels = g.input("pixel_values", dtype, ("num_images", "max_num_crops", *square))
        sizes = g.input("image_sizes", "int64", ("num_images", 2))
        inputs["image_sizes"] = "image_sizes"
        counts = None
        if encoder.padded:
            counts = g.input("image_patches", "int64", ("num_images", 2))
            inputs["image_patches"] = "image_patches"
        grid = _Grid(g, sizes, encoder, counts)
        pixels = grid.used(pixels, square)
        x = _encoder(g, encoder, pixels, weights, grid.padding)
        features = _tiled(g, encoder, projector, x, grid, weights, hidden)
    else:
        assert isinstance(projector, Pooled)
        pixels = g.input("pixel_values", dtype, ("num_images", *square))
        x = _encoder(g, encoder, pixels, weights)
        features = _pooled(g, encoder, projector, x, weights, hidden)
    g.output(features, "image_features", ("num_image_tokens", hidden))
    return Emitted(g, inputs, {"image_features": "image_features"}, {})


@dataclass(frozen=True, slots=True)
class _Padding:
    """Of each view, [n, patches]: the ``positions`` int64 of its patches, and int32 which are ``real``."""

    positions: Value
    real: Value


def _encoder(
    g: Builder, spec: Encoder, pixels: Value, weights: Parameters, padding: _Padding | None = None
) -> Value:
    """Return what the vision encoder sees in ``pixels`` [n, 3, side, side]: [n, patches, hidden]."""
    grid, patch, wide = spec.grid, spec.patch, spec.hidden
    shape: Shape = ("views", 3, grid, patch, grid, patch)
    x = g.op("Reshape", pixels, g.integers(-1, 3, grid, patch, grid, patch), shape=shape, name=_PATH)
    shape = ("views", grid, grid, 3, patch, patch)
    x = g.op("Transpose", x, shape=shape, name=_PATH, perm=(0, 2, 4, 1, 3, 5))
    patches, inputs = grid * grid, 3 * patch * patch
    # As a product: convolutions of whole patches are nothing else, and slower.
    x = g.op("Reshape", x, g.integers(-1, patches, inputs), shape=("views", patches, inputs), name=_PATH)
    x = g.product(
        x, [weights["vision.patches.weight"]], "vision.patches.weight",
        shape=("views", patches, wide), path=f"{_PATH}/patches",
    )  # fmt: skip
    if spec.patch_bias:
        bias = g.weight(weights["vision.patches.bias"])
        x = g.op("Add", x, bias, shape=("views", patches, wide), name=_PATH)
    if spec.class_token:
        views = g.op("Shape", x, shape=(1,), dtype="int64", name=_PATH, start=0, end=1)
        sizes = g.op("Concat", views, g.integers(1, wide), shape=(3,), dtype="int64", name=_PATH, axis=0)
        token = g.weight(weights["vision.class.weight"])
        token = g.op("Expand", token, sizes, shape=("views", 1, wide), name=_PATH)
        x = g.op("Concat", token, x, shape=("views", patches + 1, wide), name=_PATH, axis=1)
    seen = patches + spec.class_token
    shape = ("views", seen, wide)
    positions = g.weight(weights["vision.positions.weight"])
    if padding is not None:
        positions = g.op("Gather", positions, padding.positions, shape=shape, name=_PATH, axis=0)
    x = g.op("Add", x, positions, shape=shape, name=_PATH)
    stream = Residual(g, x, shape, weights)
    if spec.pre_norm:
        x = stream.normed(spec.norm, "vision.pre_norm", module="vision.pre_norm")
        stream = Residual(g, x, shape, weights)
    for i in range(spec.layers):
        _layer(g, spec, stream, i, weights, padding)
    if spec.final_norm:
        x = stream.normed(spec.norm, "vision.final_norm", module="vision.final_norm")
    else:
        x = stream.total("vision")
    if spec.class_token:
        ends = (g.integers(1), g.integers(seen), g.integers(1))
        x = g.op("Slice", x, *ends, shape=("views", patches, wide), name=_PATH)
    return x


def _layer(
    g: Builder, spec: Encoder, stream: Residual, i: int, weights: Parameters, padding: _Padding | None
) -> None:
    at, shape = f"vision.layers.{i}", stream.shape
    path = node_path(f"{at}.attn")
    x = stream.normed(spec.norm, f"{at}.mixer_pre", module=f"{at}.mixer_pre")
    q, k, v = linear(
        g, x, [f"{at}.{part}" for part in "qkv"],
        parameters=weights, module=f"{at}.attn.qkv_proj", shape=shape, layer=i, apart=True,
    )  # fmt: skip
    mask = () if padding is None else (None, padding.real)
    y = g.op(
        "MultiHeadAttention", q, k, v, *mask, shape=shape, name=path, domain=MICROSOFT, num_heads=spec.heads
    )
    [y] = linear(g, y, [f"{at}.o"], parameters=weights, module=f"{at}.attn.o_proj", shape=shape, layer=i)
    stream.add(y, scale=1.0, module=at)
    x = stream.normed(spec.norm, f"{at}.ffn_pre", module=f"{at}.ffn_pre")
    [y] = linear(g, x, [f"{at}.up"], parameters=weights, module=f"{at}.mlp.up_proj", shape=shape, layer=i)
    inner = (*shape[:-1], spec.ffn.intermediate)
    y = activate(g, y, spec.ffn.act, shape=inner, path=node_path(f"{at}.mlp"))
    [y] = linear(g, y, [f"{at}.down"], parameters=weights, module=f"{at}.mlp.down_proj", shape=inner, layer=i)
    stream.add(y, scale=1.0, module=at)


def _pooled(g: Builder, encoder: Encoder, spec: Pooled, x: Value, weights: Parameters, hidden: int) -> Value:
    """Return the features of views ``x`` [n, patches, wide]: [n · tokens · tokens, hidden]."""
    grid, wide, n = encoder.grid, encoder.hidden, spec.tokens
    path, size = f"{_PATH}/join", encoder.grid // spec.tokens
    x = g.op(
        "Reshape",
        x,
        g.integers(-1, n, size, n, size, wide),
        shape=("views", n, size, n, size, wide),
        name=path,
    )
    assert grid == n * size
    x = g.op("ReduceMean", x, g.integers(2, 4), shape=("views", n, n, wide), name=path, keepdims=0)
    rows: Shape = ("num_image_tokens", wide)
    x = g.op("Reshape", x, g.integers(-1, wide), shape=rows, name=path)
    x = Residual(g, x, rows, weights).normed(spec.norm, "vision.join_norm", module="vision.join_norm")
    [y] = linear(g, x, ["vision.join"], parameters=weights, module="vision.join", shape=rows)
    return y


# --- images in crops --------------------------------------------------------------------------------------


class _Grid:
    """How each image is cut: numbers of crops, and which views there are. All int64, [images] each.

    ``high`` and ``wide`` are crops from top to bottom and from left to right; ``first`` is the number of a
    image's first view, that of the whole, among the views that are used. ``patches`` [images, 2] are rows and
    columns of patches of the crops side by side that are no padding, None if there is none; ``used`` then fills in
    ``padding``.
    """

    def __init__(self, g: Builder, sizes: Value, encoder: Encoder, patches: Value | None = None) -> None:
        self._g, self._encoder, self._patches = g, encoder, patches
        side = g.integer(encoder.side)
        grid = g.op("Div", sizes, side, shape=("num_images", 2), dtype="int64", name=f"{_PATH}/grid")
        self.high = self._whole("Gather", grid, g.integer(0), axis=1)
        self.wide = self._whole("Gather", grid, g.integer(1), axis=1)
        views = self._whole("Mul", self.high, self.wide)
        self._views = self._whole("Add", views, g.integer(1))
        self.first = self._whole("CumSum", self._views, g.integer(0), exclusive=1)
        self.padding: _Padding | None = None

    def tokens(self, side: int, merge: int) -> tuple[Value, Value]:
        """Return rows and columns of tokens of the crops, of which each has ``side`` by ``side`` of them."""
        g, found = self._g, []
        for axis, crops in enumerate((self.high, self.wide)):
            if self._patches is None:
                found.append(self._whole("Mul", crops, g.integer(side)))
                continue
            # One that begins with a patch counts.
            count = self._whole("Gather", self._patches, g.integer(axis), axis=1)
            count = self._whole("Add", count, g.integer(merge - 1))
            found.append(self._whole("Div", count, g.integer(merge)))
        return found[0], found[1]

    def used(self, pixels: Value, square: tuple[int, int, int]) -> Value:
        """Return the views [n, 3, side, side] of all images that are no padding."""
        g, path = self._g, f"{_PATH}/used"
        every = g.op("Shape", pixels, shape=(1,), dtype="int64", name=path, start=1, end=2)
        every = g.op("Squeeze", every, shape=(), dtype="int64", name=path)
        numbers = g.op(
            "Range", g.integer(0), every, g.integer(1), shape=("max_num_crops",), dtype="int64", name=path
        )
        views = g.op(
            "Unsqueeze", self._views, g.integers(1), shape=("num_images", 1), dtype="int64", name=path
        )
        real = g.op("Less", numbers, views, shape=("num_images", "max_num_crops"), dtype="bool", name=path)
        real = g.op("Reshape", real, g.integers(-1), shape=("all_views",), dtype="bool", name=path)
        pixels = g.op("Reshape", pixels, g.integers(-1, *square), shape=("all_views", *square), name=path)
        places = g.op("NonZero", real, shape=(1, "views"), dtype="int64", name=path)
        places = g.op("Squeeze", places, g.integers(0), shape=("views",), dtype="int64", name=path)
        if self._patches is not None:
            self.padding = self._padding(self._patches, numbers, places)
        return g.op("Gather", pixels, places, shape=("views", *square), name=path, axis=0)

    def _padding(self, patches: Value, numbers: Value, places: Value) -> _Padding:
        """Return what is padding in the views at ``places`` of all images; ``numbers`` count those of an image."""
        g, grid, path = self._g, self._encoder.grid, f"{_PATH}/padding"

        def op(kind: str, *inputs: Value, shape: Shape, of: str = "int64", **attributes: Attribute) -> Value:
            return g.op(kind, *inputs, shape=shape, dtype=of, name=path, domain="", **attributes)

        each: Shape = ("num_images", "max_num_crops")
        crop = op("Sub", numbers, g.integer(1), shape=("max_num_crops",))
        wide = op("Unsqueeze", self.wide, g.integers(1), shape=("num_images", 1))
        found = []
        for axis, kind, table in ((0, "Div", (grid, 1)), (1, "Mod", (1, grid))):
            count = op("Gather", patches, g.integers(axis), shape=("num_images", 1), axis=1)
            before = op("Mul", op(kind, crop, wide, shape=each), g.integer(grid), shape=each)
            count = op("Sub", count, before, shape=each)
            count = op("Min", count, g.integer(grid), shape=each)
            count = op("Max", count, g.integer(0), shape=each)
            # The view of the whole has no padding.
            whole = op("Less", numbers, g.integer(1), shape=("max_num_crops",), of="bool")
            count = op("Where", whole, g.integer(grid), count, shape=each)
            count = op("Reshape", count, g.integers(-1), shape=("all_views",))
            count = op("Gather", count, places, shape=("views",), axis=0)
            at = g.constant(_spread(grid), f"{path}/spread{axis}")
            at = op("Gather", at, count, shape=("views", grid), axis=0)
            steps = g.constant(np.arange(grid, dtype=np.int64)[None], f"{path}/steps{axis}")
            count = op("Unsqueeze", count, g.integers(1), shape=("views", 1))
            real = op("Less", steps, count, shape=("views", grid), of="bool")
            shape: Shape = ("views", *table)
            sizes = g.integers(-1, *table)
            found.append(
                (op("Reshape", at, sizes, shape=shape), op("Reshape", real, sizes, shape=shape, of="bool"))
            )
        (row, high), (column, across) = found
        square: Shape = ("views", grid, grid)
        real = op("And", high, across, shape=square, of="bool")
        at = op("Mul", row, g.integer(grid), shape=("views", grid, 1))
        at = op("Where", real, op("Add", at, column, shape=square), g.integer(0), shape=square)
        flat: Shape = ("views", grid * grid)
        sizes = g.integers(-1, grid * grid)
        at = op("Reshape", at, sizes, shape=flat)
        real = op("Reshape", g.cast(real, "int32", square, path), sizes, shape=flat, of="int32")
        return _Padding(at, real)

    def _whole(self, kind: str, *inputs: Value, **attributes: Attribute) -> Value:
        return self._g.op(
            kind, *inputs, shape=("num_images",), dtype="int64", name=f"{_PATH}/grid", domain="", **attributes
        )


def _spread(grid: int) -> NDArray[np.int64]:
    """Return the positions int64 [1 + grid, grid] of 0 to ``grid`` patches, spread over a side of ``grid``.

    In float32, in which some fall below the whole number that they are.
    """
    ends = np.arange(1 / grid, 1.0, 1 / grid).astype(np.float32)
    steps = np.arange(grid, dtype=np.float32)
    table = np.zeros((1 + grid, grid), np.int64)
    for count in range(1, 1 + grid):
        at = np.minimum(steps * (np.float32(1) / np.float32(count)), np.float32(1.0 - 1e-6))
        table[count] = np.searchsorted(ends, at, side="right")
    return table


def _tiled(
    g: Builder, encoder: Encoder, spec: Tiles, x: Value, grid: _Grid, weights: Parameters, hidden: int
) -> Value:
    """Return the features of views ``x`` [n, patches, wide], in the order of the text: [tokens, hidden].

    Every merged patch goes through the projector once, and so do the two separators; then all are put in order.
    """
    path, merge, wide = f"{_PATH}/join", spec.merge, encoder.hidden
    side = encoder.grid // merge
    merged = spec.width(encoder)
    shape: Shape = ("views", side, merge, side, merge, wide)
    x = g.op("Reshape", x, g.integers(-1, side, merge, side, merge, wide), shape=shape, name=path)
    shape = ("views", side, side, merge, merge, wide)
    x = g.op("Transpose", x, shape=shape, name=path, perm=(0, 1, 3, 2, 4, 5))
    if spec.mean:
        shape = ("views", side, side, wide)
        x = g.op("ReduceMean", x, g.integers(3, 4), shape=shape, name=path, keepdims=0)
    x = g.op("Reshape", x, g.integers(-1, merged), shape=("patches", merged), name=path)
    ends = [
        g.op(
            "Reshape",
            g.weight(weights[f"vision.{name}.weight"]),
            g.integers(1, merged),
            shape=(1, merged),
            name=path,
        )
        for name in ("row_end", "view_end")
    ]
    rows: Shape = ("rows", merged)
    x = g.op("Concat", x, *ends, shape=rows, name=path, axis=0)
    [x] = linear(g, x, ["vision.join1"], parameters=weights, module="vision.join1", shape=rows)
    rows = ("rows", hidden)
    x = activate(g, x, spec.act, shape=rows, path=path)
    [x] = linear(g, x, ["vision.join2"], parameters=weights, module="vision.join2", shape=rows)
    return g.op(
        "Gather", x, _order(g, x, grid, side, merge), shape=("num_image_tokens", hidden), name=path, axis=0
    )


def _order(g: Builder, rows: Value, grid: _Grid, side: int, merge: int) -> Value:
    """Return which of ``rows`` each token is, int64 [tokens].

    ``rows`` are [merged patches of all views, end of a row, end of the crops]. Of an image, rows of patches
    through all crops come first, each with an end; then the end of the crops; then the view of
    the whole.
    """
    path, area = f"{_PATH}/order", side * side

    def op(kind: str, *inputs: Value, shape: Shape = ("num_image_tokens",), **attributes: Attribute) -> Value:
        return g.op(kind, *inputs, shape=shape, dtype="int64", name=path, domain="", **attributes)

    def yes(kind: str, a: Value, b: Value, shape: Shape = ("num_image_tokens",)) -> Value:
        return g.op(kind, a, b, shape=shape, dtype="bool", name=path)

    per = ("num_images",)
    sides = g.integer(side)
    in_column, in_row = grid.tokens(side, merge)  # patches through all crops
    row = op("Add", in_row, g.integer(1), shape=per)
    crops = op("Mul", in_column, row, shape=per)  # tokens of the crops
    whole = side * (side + 1)
    tokens = op("Add", crops, g.integer(1 + whole), shape=per)
    ends = op("CumSum", tokens, g.integer(0), shape=per)
    starts = op("Sub", ends, tokens, shape=per)
    total = op("ReduceSum", tokens, g.integers(0), shape=(), keepdims=0)
    at = op("Range", g.integer(0), total, g.integer(1))
    column = op("Unsqueeze", at, g.integers(1), shape=("num_image_tokens", 1))
    after = yes("GreaterOrEqual", column, ends, ("num_image_tokens", "num_images"))
    image = op(
        "ReduceSum",
        g.cast(after, "int64", ("num_image_tokens", "num_images"), path),
        g.integers(1),
        keepdims=0,
    )

    def of(each: Value) -> Value:
        return op("Gather", each, image, axis=0)

    count = op("Shape", rows, shape=(1,), start=0, end=1)
    count = op("Squeeze", count, shape=())
    row_end, view_end = op("Sub", count, g.integer(2), shape=()), op("Sub", count, g.integer(1), shape=())
    at = op("Sub", at, of(starts))
    base = op("Mul", of(grid.first), g.integer(area))

    # Among the crops: row y and column x of patches through all of them.
    y, x = op("Div", at, of(row)), op("Mod", at, of(row))
    crop = op("Add", op("Mul", op("Div", y, sides), of(grid.wide)), op("Div", x, sides))
    patch = op("Add", op("Mul", op("Mod", y, sides), sides), op("Mod", x, sides))
    # The view of the whole is number 0.
    crop = op("Mul", op("Add", crop, g.integer(1)), g.integer(area))
    inside = op("Add", base, op("Add", crop, patch))
    inside = op("Where", yes("Equal", x, of(in_row)), row_end, inside)

    # In the view of the whole, after the crops and their end.
    behind_crops = op("Sub", op("Sub", at, of(crops)), g.integer(1))
    y, x = op("Div", behind_crops, g.integer(side + 1)), op("Mod", behind_crops, g.integer(side + 1))
    outside = op("Add", base, op("Add", op("Mul", y, sides), x))
    outside = op("Where", yes("Equal", x, sides), row_end, outside)

    place = op("Where", yes("Less", at, of(crops)), inside, outside)
    return op("Where", yes("Equal", at, of(crops)), view_end, place)
