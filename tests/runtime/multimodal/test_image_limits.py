# ruff: noqa: E501 - a file is easier to read in one line
"""Files of images that would take long or much memory are refused before they are decoded."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ortlm.artifact import Graph, Images
from ortlm.errors import BadImage, BadOption, ContextFull
from ortlm.runtime.multimodal.image_loading import open_image
from ortlm.runtime.multimodal.vision_encoder import VisionEncoder


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int = 2, height: int = 2, extra: bytes = b"") -> bytes:
    packed = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packed.compress(row) for _ in range(min(height, 2000))) + packed.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    with io.BytesIO() as file:
        (image or Image.new("RGB", (8, 8))).save(file, form, **options)
        return file.getvalue()


JPEG = saved("JPEG")
NOISE = Image.effect_noise((2000, 2000), 50).convert("RGB")
GIF = saved("GIF")


def gif(blocks: bytes) -> bytes:
    at = GIF.index(b"!") if b"!" in GIF else GIF.index(b",", 13)
    return GIF[:at] + blocks + GIF[at:]


def scans(count: int) -> bytes:
    data = saved("JPEG", NOISE, progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at : at + 14] * count + b"\xff\xd9"


MANY = "consists of too many pieces, such as comments"
HOSTILE = {
    "tall png": (lambda: png(1, 99_999_999), "a side may have at most 65535"),
    "wide png": (lambda: png(99_999_999, 1), "a side may have at most 65535"),
    "large png": (lambda: png(60_000, 60_000), "3600 million|3.6e|more than the 100 million"),
    "texts": (lambda: png(extra=chunk(b"tEXt", b"a\0b") * 300_000), MANY),
    "unknown chunks": (lambda: png(extra=chunk(b"abCd", b"") * 300_000), MANY),
    "empty data": (lambda: png(extra=chunk(b"IDAT", b"") * 300_000), MANY),
    "text bomb": (lambda: png(extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 1))), "header cannot be read"),
    "profile bomb": (lambda: png(extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 1))), "header cannot be read"),
    "gif comments": (lambda: gif(b"!\xfe\x01a\0" * 300_000), MANY),
    "gif extensions": (lambda: gif(b"!\xf9\x04\0\0\0\0\0" * 300_000), MANY),
    "jpeg segments": (lambda: JPEG[:2] + b"\xff\xe5\0\x02" * 300_000 + JPEG[2:], MANY),
    "jpeg comments": (lambda: JPEG[:2] + b"\xff\xfe\0\x03a" * 300_000 + JPEG[2:], MANY),
    "jpeg filling": (lambda: JPEG[:2] + b"\xff" * 3_000_000 + JPEG[2:], MANY),
    "jpeg scans": (lambda: scans(2000), "scans, more than any JPEG of its size needs"),
    "ppm comments": (lambda: b"P6\n" + b"#a\n" * 1_000_000 + b"1 1 255\nabc", MANY),
    "ppm in text": (lambda: b"P3\n3000 3000 255\n" + b"1 " * 3_000_000, "PPM in plain text of 6.0 MB"),
    "tags": (lambda: b"II*\0\x08\0\0\0\xff\xff" + b"".join(struct.pack("<HHII", t, 3, 1, 1) for t in range(65535)), "is damaged|too many pieces"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_soon(name):
    make, message = HOSTILE[name]
    data = make()
    began = time.monotonic()
    with pytest.raises(BadImage, match=message):
        open_image(data)
    assert time.monotonic() - began < 10


def test_large_images_are_no_attack():
    # Encoders write small pieces: 8 kB each.
    image = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    for form in ("PNG", "TIFF", "BMP"):
        data = saved(form, Image.fromarray(image), **({"compress_level": 0} if form == "PNG" else {}))
        assert np.array_equal(np.asarray(open_image(data)), image)
    # Pillow 10 writes a single strip.
    with contextlib.suppress(NotImplementedError):
        strips = saved("TIFF", Image.fromarray(image), tiffinfo={278: 1})
        assert open_image(strips).size == (1500, 1500)
    assert open_image(saved("JPEG", NOISE, progressive=True)).size == (2000, 2000)
    assert open_image(saved("GIF", NOISE)).size == (2000, 2000)
    assert open_image(png(65_535, 2)).size == (65_535, 2)


@pytest.mark.parametrize(
    "array",
    [
        np.broadcast_to(np.uint8(0), (10**6, 10**6)),
        np.broadcast_to(np.uint8(0), (1, 70_000)),
        np.zeros((0, 5, 3), np.uint8),
        np.full((4, 4, 3), np.nan),
        np.zeros((4, 4), object),
        np.zeros((4, 4), "U5"),
        np.zeros((4, 4), np.complex64),
        np.zeros((4, 4, 3), [("a", np.uint8)]),
        np.zeros((1,) * 30, np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda a: f"{a.dtype} {a.shape[:3]}",
)
def test_arrays_that_are_no_images(array):
    with pytest.raises(BadOption):
        open_image(array)


def test_crops_are_checked_before_they_are_cut():
    images = Images(side=336, mean=(0, 0, 0), std=(1, 1, 1), tag="<|image_{}|>", crops=16)

    def opened():
        raise AssertionError("nothing is computed")

    encoder = VisionEncoder(images, Graph("vision", "vision.onnx", {}, {}), opened, context_tokens=4096)
    image = np.zeros((999, 999, 3), np.uint8)
    with pytest.raises(
        ContextFull, match=r"has \d+ tokens if it is cut into up to 256 crops.*fewer than 4096.*num_crops"
    ):
        encoder.read(image, 256)
    with pytest.raises(ContextFull, match="fewer than 16384"):
        VisionEncoder(images, Graph("vision", "vision.onnx", {}, {}), opened).read(image, 256)
