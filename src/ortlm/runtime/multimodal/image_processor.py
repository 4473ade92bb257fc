"""From an image in RGB to the pixels that a vision encoder takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import PanAndScan, Patches
from ortlm.errors import BadImage, BadOption

if TYPE_CHECKING:
    from PIL import Image

from ortlm.runtime.multimodal.image_loading import _check_rgb

# As in the reference; what is thinner says nothing.
_MOST_RATIO = 200
# Fewer pixels are too few for the reference, too.
_LEAST_SEEN = 10


def hd_size(width: int, height: int, *, side: int = 336, most: int) -> tuple[int, int]:
    """Return (height, width) in pixels of what ``hd_crops`` cuts up: multiples of ``side``.

    Raises BadOption if a number is below 1.
    """
    wide, high = _fitted(width, height, side, most)
    return math.ceil(high / side) * side, math.ceil(wide / side) * side


def hd_crops(
    image: Image.Image,
    *,
    most: int,
    side: int = 336,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Return what Phi-3.5-vision sees of an RGB ``image``, and (height, width) of the image it was cut from.

    Pixels are float32 [1 + n, 3, side, side] with n = (height / side) * (width / side) <= ``most``: the whole
    image first, then the crops row by row. The image is made as large as ``most`` crops allow and gets white
    bands on the sides that do not fill a crop. ``mean`` and ``std`` are those of the three channels. Raises
    BadOption if ``most`` or ``side`` is below 1.
    """
    from PIL import Image

    _check_rgb(image)
    wide, high = _fitted(*image.size, side, most)
    height, width = hd_size(*image.size, side=side, most=most)
    if image.width < image.height:
        # The reference turns portraits on their side and back. Pillow resizes along x, then along y, and rounds in
        # between; so the same values come out of the other order.
        image = image.resize((image.width, high), Image.Resampling.BILINEAR)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    if image.size != (width, height):
        page = Image.new("RGB", (width, height), (255, 255, 255))
        page.paste(image, ((width - wide) // 2, (height - high) // 2))
        image = page
    return _cut(_normalized(image, mean, std), side), (height, width)


@dataclass(frozen=True, slots=True)
class Crops:
    """An image that is cut up: ``size`` (height, width) in pixels of all crops side by side.

    Its upper left ``seen`` (height, width) pixels are the image, the rest is padding. ``patches`` are rows and
    columns of patches of which at least a part is no padding.
    """

    size: tuple[int, int]
    seen: tuple[int, int]
    patches: tuple[int, int]


def even_crops(width: int, height: int, *, side: int, patch: int, most: int) -> Crops:
    """Return how ``padded_crops`` cuts an image of ``width`` by ``height`` pixels.

    Raises BadImage for a shape of which too little would be left, BadOption if ``most`` or ``side`` is below 1.
    """
    if min(width, height, side, most) < 1:
        raise BadOption(
            f"width, height, side and most must be at least 1; found {width}, {height}, {side}, {most}."
        )
    wide, high = math.ceil(width / side), math.ceil(height / side)
    if wide * high > most:
        wide, high = _nearest_shape(width, height, side, most)
    page = (high * side, wide * side)
    across, down = page[1] / width, page[0] / height
    seen = (int(height * across), page[1]) if across < down else (page[0], int(width * down))
    patches = tuple((n * side - m) // patch for n, m in zip((high, wide), seen, strict=True))
    left = (page[0] // patch - patches[0], page[1] // patch - patches[1])
    # Padding of a whole crop and more would leave a view without an image.
    if min(seen) < _LEAST_SEEN or any((n - 1) * side >= m for n, m in zip((high, wide), seen, strict=True)):
        raise BadImage(
            f"the image has {width} by {height} pixels, which is too long: {seen[1]} by {seen[0]} would be left "
            f"of {page[1]} by {page[0]}. Cut it, add a border, or allow more crops with num_crops."
        )
    return Crops(page, seen, left)


def padded_crops(
    image: Image.Image, crops: Crops, *, side: int, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Return what Phi-4-multimodal sees of an RGB ``image``: float32 [1 + n, 3, side, side].

    The whole image with its padding comes first, then the crops row by row. The image is at the upper left, and
    padding is white.
    """
    from PIL import Image

    _check_rgb(image)
    (height, width), (high, wide) = crops.size, crops.seen
    page = Image.new("RGB", (width, height), (255, 255, 255))
    page.paste(image.resize((wide, high), Image.Resampling.BILINEAR), (0, 0))
    return _cut(_normalized(page, mean, std), side)


def _nearest_shape(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Return columns and rows of at most ``most`` crops whose shape is nearest to an image's.

    Of shapes that are equally near, the larger one is taken as long as the image fills more than half of it.
    """
    shapes = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)]
    best, least = (1, 1), math.inf
    for i, j in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        off = abs(width / height - i / j)
        if off < least or (off == least and width * height > 0.5 * side * side * i * j):
            best, least = (i, j), off
    return best


def whole_pixels(
    image: Image.Image, *, side: int, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Return an RGB ``image`` stretched to a square, as Gemma 3 sees it: float32 [1, 3, side, side]."""
    from PIL import Image

    _check_rgb(image)
    if side < 1:
        raise BadOption(f"side must be at least 1 pixel, found {side}.")
    return _normalized(image.resize((side, side), Image.Resampling.BILINEAR), mean, std)[None]


def scanned(image: Image.Image, *, most: int, scan: PanAndScan) -> list[Image.Image]:
    """Return the crops, ``most`` at most, that ``scan`` cuts an RGB ``image`` into; none for one that is not long.

    Crops have one size, but for the last, which ends with the image. Raises BadImage if there would be more crops
    than the image has pixels for.
    """
    _check_rgb(image)
    long, short = max(image.size), min(image.size)
    if most < 1 or long / short < scan.ratio:
        return []
    count = min(most, max(2, min(long // scan.smallest, math.floor(long / short + 0.5))))
    length = math.ceil(long / count)
    if min(length, short) < scan.smallest:
        return []
    starts = range(0, length * count, length)
    if starts[-1] >= long:
        raise BadImage(
            f"the image has {long} pixels along its longer side, which do not make {count} crops of {length}. "
            "Allow fewer crops with num_crops."
        )
    wide = image.width >= image.height
    ends = [(at, min(at + length, long)) for at in starts]
    return [image.crop((at, 0, to, short) if wide else (0, at, short, to)) for at, to in ends]


def patch_grid(width: int, height: int, patches: Patches) -> tuple[int, int]:
    """Return rows and columns of patches of an image of ``width`` by ``height`` pixels.

    Raises BadImage for one that is more than 200 times as long as it is wide.
    """
    if max(width, height) > _MOST_RATIO * min(width, height):
        raise BadImage(
            f"the image has {width} by {height} pixels; the longer side may be at most {_MOST_RATIO} times the "
            "shorter. Cut it, or add a border."
        )
    side = patches.size * patches.merge

    high, wide = (round(n / side) * side for n in (height, width))
    if high * wide > patches.most:
        shrink = math.sqrt(height * width / patches.most)
        high, wide = (max(side, math.floor(n / shrink / side) * side) for n in (height, width))
    elif high * wide < patches.least:
        grow = math.sqrt(patches.least / (height * width))
        high, wide = (math.ceil(n * grow / side) * side for n in (height, width))
    return high // patches.size, wide // patches.size


def patch_pixels(
    image: Image.Image, patches: Patches, *, mean: Sequence[float], std: Sequence[float]
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Return the patches of an RGB ``image`` of any size, and rows and columns of its patches.

    Pixels are float32 [rows · columns, 3 · frames · size · size], in the order that ``Patches`` says.
    """
    from PIL import Image

    _check_rgb(image)
    rows, columns = patch_grid(*image.size, patches)
    size, merge = patches.size, patches.merge
    image = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    pixels = _normalized(image, mean, std)
    squares = pixels.reshape(3, rows // merge, merge, size, columns // merge, merge, size)
    squares = squares.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    repeated = np.broadcast_to(squares, (*squares.shape[:5], patches.frames, size, size))
    return repeated.reshape(rows * columns, -1), (rows, columns)


def _fitted(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Return (width, height) in pixels to which an image is resized; bands then fill up the shorter side."""
    if min(width, height, side, most) < 1:
        raise BadOption(
            f"width, height, side and most must be at least 1; found {width}, {height}, {side}, {most}."
        )
    if width < height:
        high, wide = _fitted(height, width, side, most)
        return wide, high
    ratio = width / height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= most:
        scale += 1
    # A line of pixels would be resized to nothing, where the reference fails.
    return scale * side, max(1, int(scale * side / ratio))


def _cut(whole: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return ``whole`` [3, height, width] scaled to one view, and its crops row by row: [1 + n, 3, side, side]."""
    rows, columns = whole.shape[1] // side, whole.shape[2] // side
    pixels = np.empty((1 + rows * columns, 3, side, side), dtype=np.float32)
    pixels[0] = _bicubic(whole, side)
    crops = whole.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
    pixels[1:] = crops.reshape(-1, 3, side, side)
    return pixels


def _normalized(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Return the pixels of ``image`` as float32 [3, height, width], 0..1 less ``mean``, by ``std``."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    tables = (levels - np.asarray(mean, np.float32).reshape(3, 1)) / np.asarray(std, np.float32).reshape(3, 1)
    pixels = np.asarray(image)
    return np.stack([tables[channel][pixels[..., channel]] for channel in range(3)])


def _bicubic(image: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return float32 [3, height, width] as [3, side, side], by torch's bicubic interpolation without antialias."""
    index, weights = _taps(image.shape[1], side)
    lines = sum(w[:, None] * image[:, at] for at, w in zip(index, weights, strict=True))
    assert isinstance(lines, np.ndarray)
    index, weights = _taps(image.shape[2], side)
    resized: NDArray[np.float32] = sum(w * lines[:, :, at] for at, w in zip(index, weights, strict=True))
    return resized


def _taps(size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return which four of ``size`` values make each of ``side`` values, and their weights: two [4, side]."""
    place = (np.arange(side) + 0.5) * (size / side) - 0.5
    first = np.floor(place)
    part = place - first
    a = -0.75

    def near(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(part + 1), near(part), near(1 - part), far(2 - part)]).astype(np.float32)
    index = first.astype(np.int64) + np.arange(-1, 3)[:, None]
    return index.clip(0, size - 1), weights
