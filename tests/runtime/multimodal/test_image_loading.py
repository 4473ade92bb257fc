"""Images against Pillow and torch, which do what the processors of Phi-3.5-vision and Gemma 3 do."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from ortlm._version import __version__
from ortlm.artifact import PanAndScan
from ortlm.errors import BadImage, BadOption
from ortlm.runtime.multimodal import image_loading as images
from ortlm.runtime.multimodal import image_processor
from ortlm.runtime.multimodal.image_loading import image_key, open_image
from ortlm.runtime.multimodal.image_processor import hd_crops, hd_size, scanned, whole_pixels

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]


def photo(width, height, seed=0):
    """Return an RGB image with smooth areas, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin((x * (k + 1) + y * (3 - k)) / 17 + k) for k in range(3)]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 0)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def rotated(orientation, form="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(photo(90, 60), form, exif=exif)


def with_alpha(mode, width=70, height=50):
    image = photo(width, height).convert(mode)
    image.putalpha(Image.fromarray((np.arange(width * height) % 256).astype(np.uint8).reshape(height, width)))
    return image


def palette(transparency=None):
    image = photo(80, 64).quantize(200)
    return saved(image) if transparency is None else saved(image, transparency=transparency)


def animation(form):
    return saved(photo(64, 48), form, save_all=True, append_images=[photo(64, 48, 1), photo(64, 48, 2)])


FILES = {
    "landscape": lambda: saved(photo(640, 400)),
    "portrait": lambda: saved(photo(400, 640)),
    "square": lambda: saved(photo(300, 300)),
    "wide screen": lambda: saved(photo(960, 540)),
    "telephone": lambda: saved(photo(540, 960)),
    "1x1": lambda: saved(photo(1, 1)),
    "2x3": lambda: saved(photo(2, 3)),
    "4:1": lambda: saved(photo(400, 100)),
    "1:4": lambda: saved(photo(100, 400)),
    "20:1": lambda: saved(photo(600, 30)),
    "1:20": lambda: saved(photo(30, 600)),
    "337x336": lambda: saved(photo(337, 336)),
    "336x337": lambda: saved(photo(336, 337)),
    "exact": lambda: saved(photo(672, 672)),
    "line": lambda: saved(photo(50, 1)),
    "grey": lambda: saved(photo(120, 90).convert("L")),
    "grey jpeg": lambda: saved(photo(90, 120).convert("L"), "JPEG"),
    "LA": lambda: saved(with_alpha("L")),
    "RGBA": lambda: saved(with_alpha("RGB")),
    "palette": palette,
    "palette, one transparent": lambda: palette(3),
    "palette, several transparent": lambda: palette(bytes(range(200))),
    "1 bit": lambda: saved(photo(60, 90).convert("1")),
    "jpeg": lambda: saved(photo(333, 222), "JPEG"),
    "cmyk jpeg": lambda: saved(photo(111, 77).convert("CMYK"), "JPEG"),
    "cmyk tiff": lambda: saved(photo(77, 111).convert("CMYK"), "TIFF"),
    "turned jpeg": lambda: rotated(6),
    "turned tiff": lambda: rotated(8, "TIFF"),
    "gif": lambda: animation("GIF"),
    "apng": lambda: animation("PNG"),
    "bmp": lambda: saved(photo(65, 31), "BMP"),
    "ppm": lambda: saved(photo(31, 65), "PPM"),
    "lab tiff": lambda: saved(Image.new("LAB", (30, 20), (120, 140, 90)), "TIFF"),
}
if features.check("webp"):
    FILES["webp"] = lambda: saved(photo(200, 150), "WEBP")
    FILES["animated webp"] = lambda: animation("WEBP")


def reference_image(data):
    with Image.open(io.BytesIO(data)) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ImageOps.exif_transpose(image).convert("RGB")


def reference_crops(image, most, mean=MEAN, std=STD):
    """Do what the processor of Phi-3.5-vision does, in its order."""
    width, height = image.size
    on_its_side = width < height
    if on_its_side:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        width, height = image.size
    ratio = width / height
    scale = 1
    while scale * np.ceil(scale / ratio) <= most:
        scale += 1
    scale -= 1
    new_width = int(scale * 336)
    new_height = max(1, int(new_width / ratio))
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    target = int(np.ceil(new_height / 336) * 336)
    image = ImageOps.expand(
        image,
        (0, int((target - new_height) / 2), 0, target - new_height - int((target - new_height) / 2)),
        fill=(255, 255, 255),
    )
    if on_its_side:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    whole = (whole - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    height, width = whole.shape[1:]
    view = torch.nn.functional.interpolate(whole[None], size=(336, 336), mode="bicubic", align_corners=False)
    crops = whole.reshape(3, height // 336, 336, width // 336, 336).permute(1, 3, 0, 2, 4)
    return torch.cat([view, crops.reshape(-1, 3, 336, 336)]).numpy(), (height, width)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_the_reference(name, tmp_path):
    data = FILES[name]()
    path = tmp_path / "image"
    path.write_bytes(data)
    image = open_image(path)
    assert image.mode == "RGB"
    want = reference_image(data)
    assert image.size == want.size
    assert image.tobytes() == want.tobytes()
    for most in (1, 4, 16):
        got, size = hd_crops(image, most=most, mean=MEAN, std=STD)
        expected, expected_size = reference_crops(want, most)
        assert size == expected_size == hd_size(*image.size, most=most)
        assert got.dtype == np.float32
        assert got.shape == expected.shape
        assert np.array_equal(got[1:], expected[1:])
        np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-5)


def test_the_whole_view_is_that_of_torch_for_any_size():
    rng = np.random.default_rng(0)
    for height, width, side in ((7, 50, 9), (33, 21, 14), (5, 5, 5), (1, 3, 8), (64, 100, 31)):
        whole = rng.standard_normal((3, height, width), dtype=np.float32)
        want = torch.nn.functional.interpolate(
            torch.from_numpy(whole)[None], size=(side, side), mode="bicubic", align_corners=False
        )[0]
        # torch finds its places in float32, which is exact for the multiples that hd_crops makes.
        np.testing.assert_allclose(image_processor._bicubic(whole, side), want.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("most", "width", "height", "size", "tokens"),
    [
        (4, 500, 500, (672, 672), 757),
        (4, 1920, 1080, (672, 672), 757),
        (4, 400, 100, (336, 1344), 745),
        (4, 100, 400, (1344, 336), 781),
        (16, 500, 500, (1344, 1344), 2509),
        (16, 1920, 1080, (1008, 1680), 2353),
        (16, 1080, 1920, (1680, 1008), 2377),
        (1, 1920, 1080, (336, 336), 313),
    ],
)
def test_known_sizes(most, width, height, size, tokens):
    assert hd_size(width, height, most=most) == size
    rows, columns = size[0] // 336, size[1] // 336
    assert (rows * columns + 1) * 144 + 1 + (rows + 1) * 12 == tokens


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 5000), (5000, 1), (1, 2**31), (10**8, 1), (3, 4000)]
)
@pytest.mark.parametrize("most", [1, 2, 4, 7, 16, 40])
def test_extreme_shapes_have_a_size(width, height, most):
    rows, columns = (size // 336 for size in hd_size(width, height, most=most))
    assert 1 <= rows * columns <= most


def test_no_shape_has_more_crops_than_allowed():
    rng = np.random.default_rng(1)
    for _ in range(3000):
        width, height = (int(2 ** rng.uniform(0, 14)) for _ in range(2))
        most = int(rng.integers(1, 30))
        rows, columns = (size // 336 for size in hd_size(width, height, most=most))
        assert 1 <= rows * columns <= most
        assert hd_size(height, width, most=most) == (columns * 336, rows * 336)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_a_line_of_pixels_is_cut_as_anything_else(size):
    image = photo(*size)
    got, _ = hd_crops(image, most=4, mean=MEAN, std=STD)
    want, _ = reference_crops(image, 4)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_other_sides():
    got, size = hd_crops(photo(40, 20), most=2, side=14, mean=HALF, std=HALF)
    assert size == (14, 28)
    assert got.shape == (3, 3, 14, 14)


@pytest.mark.parametrize("size", [(300, 200), (97, 411), (1, 1), (1500, 30)])
def test_whole_pixels_are_those_of_gemma3(size):
    gemma3 = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    image = photo(*size)
    processor = gemma3.Gemma3ImageProcessorPil(size={"height": 224, "width": 224})
    want = processor(image, return_tensors="np")["pixel_values"]
    got = whole_pixels(image, side=224, mean=HALF, std=HALF)
    assert got.dtype == np.float32
    assert got.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def cut(image, most, smallest, ratio):
    """Return what is seen of ``image`` with its crops, [views, 3, 56, 56], and what transformers makes of it."""
    gemma3 = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = gemma3.Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56},
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=smallest,
        pan_and_scan_max_num_crops=most,
        pan_and_scan_min_ratio_to_activate=ratio,
    )
    want = processor(image, return_tensors="np")
    views = [image, *scanned(image, most=most, scan=PanAndScan(smallest, ratio, "", "", ""))]
    assert want["num_crops"] == [len(views) - 1]
    return np.concatenate([whole_pixels(v, side=56, mean=HALF, std=HALF) for v in views]), want[
        "pixel_values"
    ]


@pytest.mark.parametrize(
    "size",
    [
        (300, 200), (200, 300), (640, 640), (700, 640), (768, 640), (767, 640), (513, 257), (1300, 300),
        (300, 1301), (2000, 256), (255, 4000), (1, 5000), (1025, 333), (601, 599), (1023, 1280), (1, 1),
    ],
)  # fmt: skip
def test_pan_and_scan_is_that_of_gemma3(size):
    got, want = cut(photo(*size), 4, 256, 1.2)
    np.testing.assert_array_equal(got, want)


def test_pan_and_scan_with_any_numbers():
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(150):
        width, height = (int(2 ** rng.uniform(3, 9)) for _ in range(2))
        most = int(rng.integers(1, 7))
        got, want = cut(photo(width, height), most, int(rng.integers(7, 60)), float(rng.uniform(0.5, 3)))
        np.testing.assert_array_equal(got, want)
        seen.add(len(got))
    assert seen == {1, 2, 3, 4, 5, 6, 7}


def test_an_image_without_pixels_for_its_crops():
    scan = PanAndScan(1, 1.0, "", "", "")
    with pytest.raises(BadImage, match=r"5 pixels along its longer side.*4 crops of 2.*num_crops"):
        scanned(photo(5, 1), most=4, scan=scan)
    assert scanned(photo(5, 1), most=0, scan=scan) == []


def pgm(values):
    """Return uint16 [height, width] as a grey image of 16 bits; older Pillow cannot write one."""
    return b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes()


@pytest.mark.parametrize("step", [32, 1 / 8])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_high_byte(form, step):
    values = (np.arange(40 * 50) * step).astype(np.uint16).reshape(40, 50)
    image = open_image(pgm(values) if form == "PPM" else saved(Image.fromarray(values), form))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[..., 1], values >> 8)


def test_integers_and_floats_of_pillow():
    values = (np.arange(40 * 50) % 256).astype(np.int32).reshape(40, 50)
    assert np.array_equal(np.asarray(open_image(Image.fromarray(values)))[..., 0], values)
    assert np.array_equal(np.asarray(open_image(Image.fromarray(values * 256)))[..., 0], values)
    with pytest.raises(BadImage, match=r"values from -1 to 254; allowed are 0\.\.65535"):
        open_image(Image.fromarray(values - 1))
    with pytest.raises(BadImage, match="floating point"):
        open_image(Image.fromarray(values.astype(np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_images_stand_upright(orientation, form):
    data = rotated(orientation, form)
    image = open_image(data)
    assert image.tobytes() == reference_image(data).tobytes()
    assert open_image(image).tobytes() == image.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_notes_leave_the_image():
    plain = saved(photo(20, 10), "JPEG")
    damaged = saved(photo(20, 10), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert image_key(open_image(damaged)) == image_key(open_image(plain))


def test_every_source_gives_the_same_image(tmp_path):
    image = photo(31, 17)
    data = saved(image)
    path = tmp_path / "an image.png"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    array = np.asarray(image)
    opaque = np.concatenate([array, np.full((17, 31, 1), 255, np.uint8)], axis=-1)
    lazy = Image.open(path)
    sources = {
        "path": path,
        "str": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "data": f"data:image/png;base64,{encoded}",
        "capitals": f"DATA:IMAGE/PNG;charset=x;BASE64,{encoded}",
        "no type": f"data:;base64,{encoded}",
        "lines": "data:image/png;base64,"
        + "\n".join(encoded[i : i + 60] for i in range(0, len(encoded), 60)),
        "no padding": "data:image/png;base64," + encoded.rstrip("="),
        "of URLs": "data:image/png;base64," + encoded.replace("+", "-").replace("/", "_"),
        "quoted": "data:image/png;base64," + quote(encoded, safe=""),
        "percent": f"data:application/octet-stream,{quote(data)}",
        "PIL": image,
        "lazy PIL": lazy,
        "array": array,
        "array, 4": opaque,
        "array, other strides": np.asfortranarray(array),
    }
    keys = {name: image_key(open_image(source)) for name, source in sources.items()}
    assert set(keys.values()) == {image_key(image)}, keys
    # Neither changed nor closed.
    assert lazy.getpixel((0, 0)) == image.getpixel((0, 0))
    lazy.close()


def test_grey_arrays():
    grey = np.asarray(photo(12, 9).convert("L"))
    want = image_key(Image.fromarray(grey).convert("RGB"))
    assert image_key(open_image(grey)) == image_key(open_image(grey[..., None])) == want


def test_keys_tell_images_apart(monkeypatch):
    monkeypatch.setattr(images, "_KEY_TILE", 8)
    image = photo(20, 30)
    other = image.copy()
    other.putpixel((19, 29), (1, 2, 3))
    blank = [Image.new("RGB", size) for size in ((20, 30), (30, 20), (10, 60), (600, 1))]
    keys = {image_key(image) for image in (image, other, *blank)}
    assert len(keys) == 6
    assert image_key(image.copy()) == image_key(image)


def test_an_image_of_the_caller_stays_as_it_is():
    image = photo(20, 30).quantize(16)
    image.info["transparency"] = bytes(range(16))
    before = image.tobytes()
    open_image(image)
    assert image.mode == "P"
    assert image.tobytes() == before
    assert image.info["transparency"] == bytes(range(16))
    rgb = photo(5, 5)
    opened = open_image(rgb)
    opened.putpixel((0, 0), (9, 9, 9))
    assert rgb.tobytes() == photo(5, 5).tobytes()


def header_of_png(width, height, colours=2):
    """Return a PNG of that size which holds one row of it at most."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BROKEN = {
    "nothing": (lambda: b"", "is empty: 0 bytes"),
    "text": (
        lambda: b"<html>Not found</html>",
        r"no image that can be read: it begins with b'<html>No'.*JPEG, PNG",
    ),
    "a letter": (lambda: b"P", "no image that can be read|header cannot be read"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image that can be read"),
    "cut jpeg": (lambda: FILES["jpeg"]()[:3000], "damaged or cut off: its JPEG data cannot be decoded"),
    "cut png": (lambda: FILES["landscape"]()[:3000], "damaged or cut off: its PNG data cannot be decoded"),
    "cut gif": (lambda: FILES["gif"]()[:1000], "damaged or cut off: its GIF data"),
    "header of png": (lambda: FILES["jpeg"]()[:20], "its JPEG header cannot be read"),
    "begin of png": (lambda: saved(photo(9, 9))[:20], "its PNG header cannot be read"),
    "zero": (lambda: header_of_png(0, 5), "0 x 5 pixels; both must be at least 1|header cannot be read"),
    "bomb": (lambda: header_of_png(20_000, 20_000), "20000 x 20000 pixels, more than the 100 million"),
    "over": (lambda: header_of_png(10_001, 10_000), "10001 x 10000 pixels, more than"),
    "gif bomb": (
        lambda: b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x50\xc3\x50\xc3\0\2\2D\1\0;",
        "larger than allowed: .*2500000000 pixels",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, tmp_path):
    make, message = BROKEN[name]
    path = tmp_path / "broken"
    path.write_bytes(make())
    with pytest.raises(BadImage, match=message) as raised:
        open_image(path)
    assert str(path) in str(raised.value)
    with pytest.raises(BadImage, match=message):
        open_image(make())


def test_pillows_own_limit_is_silent():
    # 95 million pixels, of which Pillow would warn.
    with pytest.raises(BadImage, match="cannot be decoded"):
        open_image(header_of_png(9_500, 10_000, colours=0)[:60])
    if features.check("webp"):
        with pytest.raises(BadImage, match=r"larger than allowed|more than the|header cannot be read"):
            open_image(b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2 + bytes(8))


def test_limits(tmp_path):
    data = saved(photo(20, 10))
    path = tmp_path / "p.png"
    path.write_bytes(data)
    image = photo(20, 10)
    for source in (path, data, image, np.asarray(image)):
        assert open_image(source, most_pixels=200).size == (20, 10)
        with pytest.raises(
            BadImage, match=r"20 x 10 pixels, more than the 0.000199 million .*most_pixels=199"
        ):
            open_image(source, most_pixels=199)
    url = f"data:,{quote(data)}"
    for source in (path, data, bytearray(data), memoryview(data), url):
        open_image(source, most_bytes=len(data))
        with pytest.raises(BadImage, match=f"most_bytes={len(data) - 1}"):
            open_image(source, most_bytes=len(data) - 1)


def test_places_without_an_image(tmp_path, monkeypatch):
    with pytest.raises(BadImage, match=r"nowhere.png does not exist. An image must be a path, an http"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(BadImage, match="is a folder"):
        open_image(str(tmp_path))
    with pytest.raises(
        BadImage, match=r"\(20000 characters\) cannot be read as an image: File name too long"
    ):
        open_image("A" * 20_000)
    with pytest.raises(BadImage, match=r"does not exist|null"):
        open_image("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadImage, match="is no ordinary file"):
            open_image(tmp_path / "pipe")
    path = tmp_path / "locked.png"
    path.write_bytes(saved(photo(3, 3)))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    # Permissions do not bind the user that tests often run as.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadImage, match=r"locked.png cannot be read as an image: Permission denied"):
        open_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"type float32. Allowed is uint8 .* convert values to 0\.\.255"),
        (np.zeros((4, 4), np.uint16), r"type uint16. Allowed is uint8"),
        (np.zeros((3, 5, 6), np.uint8), r"shape \[3, 5, 6\].*channels come last"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"shape \[1, 4, 4, 3\].*one image at a time"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels"),
        (Image.new("RGB", (0, 3)), "0 x 3 pixels"),
        (None, "an image must be a path, .*found NoneType"),
        (7, "found int"),
        ("file:///etc/passwd", "not from file://"),
        ("ftp://example.org/a.png", "not from ftp://"),
        ("s3://bucket/a.png", "not from s3://"),
        ("data:image/png;base64", "has no comma"),
        ("data:text/html,hello", "holds 'text/html', not an image"),
        ("data:image/png;base64,@@@@", "damaged base64"),
        ("data:image/png;base64,AAAAA", "damaged base64"),
        ("data:image/png;base64,", "the data: URL is empty"),
        ("http://", "cannot be fetched"),
        ("http://[::1/a.png", "cannot be fetched"),
        ("http://127.0.0.1:x/a.png", "cannot be fetched"),
    ],
)
def test_what_is_no_image(source, message):
    with pytest.raises(BadOption, match=message):
        open_image(source)


def test_a_closed_image(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(saved(photo(9, 9)))
    with Image.open(path) as image:
        image.load()
    image.close()
    with pytest.raises(BadImage, match="the PIL image is damaged or cut off"):
        open_image(image)


def test_bad_arguments():
    for call in (
        lambda: hd_size(5, 5, most=0),
        lambda: hd_size(0, 5, most=1),
        lambda: hd_size(5, 5, side=0, most=1),
        lambda: hd_crops(photo(2, 2), most=0, mean=MEAN, std=STD),
        lambda: whole_pixels(photo(2, 2), side=0, mean=MEAN, std=STD),
    ):
        with pytest.raises(BadOption, match="at least 1"):
            call()
    grey = photo(2, 2).convert("L")
    for call in (
        lambda: hd_crops(grey, most=1, mean=MEAN, std=STD),
        lambda: whole_pixels(grey, side=4, mean=MEAN, std=STD),
        lambda: image_key(grey),
    ):
        with pytest.raises(BadOption, match="mode 'L' where 'RGB' is needed"):
            call()


IMAGE = saved(photo(40, 30))


class Handler(BaseHTTPRequestHandler):
    """Answers as servers do, the bad ones too."""

    gone = threading.Event()

    def do_GET(self):
        getattr(self, f"get_{unquote(self.path).split('?')[0][1:].replace(' ', '_')}", self.get_missing)()

    def begin(self, code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def get_image(self):
        if self.headers["User-Agent"] == f"ortlm/{__version__}":
            self.begin(Content_Length=len(IMAGE))
            self.wfile.write(IMAGE)

    get_ein_bär = get_image

    def get_unsized(self):
        self.begin()
        self.wfile.write(IMAGE)

    def get_moved(self):
        self.begin(302, Location="/image")

    def get_to_a_file(self):
        self.begin(302, Location="file:///etc/passwd")

    def get_to_ftp(self):
        self.begin(302, Location="ftp://127.0.0.1/a.png")

    def get_round(self):
        self.begin(302, Location="/round")

    def get_missing(self):
        self.begin(404)

    def get_stated(self):
        self.begin(Content_Length=1 << 40)

    def get_endless(self):
        self.begin()
        while not self.gone.is_set():
            self.wfile.write(bytes(1 << 16))

    def get_slow(self):
        self.gone.wait(5)

    def get_drip(self):
        self.begin()
        while not self.gone.wait(0.05):
            self.wfile.write(b"x")

    def get_broken_off(self):
        self.begin(Content_Length=len(IMAGE))
        self.wfile.write(IMAGE[:100])

    def get_page(self):
        self.begin(Content_Type="text/html")
        self.wfile.write(b"<html>")

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Say nothing of clients that have hung up."""


@pytest.fixture(scope="module")
def server():
    Handler.gone.clear()
    with Server(("127.0.0.1", 0), Handler) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        Handler.gone.set()
        made.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["image", "unsized", "moved", "image?size=1&x=%20", "ein bär"])
def test_images_from_the_web(server, path):
    assert image_key(open_image(f"{server}/{path}")) == image_key(photo(40, 30))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nothing", {}, r"the server answered 404 \(Not Found\). Check the address"),
        ("to a file", {}, r"leads to 'file:///etc/passwd', which is not fetched"),
        ("to ftp", {}, "leads to 'ftp://127.0.0.1/a.png', which is not fetched"),
        ("round", {}, "redirected more than 10 times"),
        ("stated", {}, r"more than the 67.1 MB that are allowed"),
        ("image", {"most_bytes": 99}, "more than the 99 B"),
        ("endless", {"most_bytes": 1 << 20}, "more than the 1.0 MB"),
        ("slow", {"timeout": 0.2}, r"did not arrive within 0.2 s"),
        ("drip", {"timeout": 0.3}, r"did not arrive within 0.3 s"),
        ("broken off", {}, "broke off after 100 B of"),
        ("page", {}, "no image that can be read"),
        ("image", {"most_pixels": 1}, "40 x 30 pixels"),
        ("image", {"timeout": 0}, "timeout must be more than 0"),
    ],
)
def test_the_web_without_images(server, path, options, message):
    with pytest.raises(BadOption, match=message):
        open_image(f"{server}/{path}", **options)


def test_no_server():
    with Server(("127.0.0.1", 0), Handler) as made:
        port = made.server_port
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        with pytest.raises(
            BadImage, match=r"cannot be fetched: .*refused.* Check the address and the network"
        ):
            open_image(f"http://127.0.0.1:{port}/a.png")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in Linux's /proc")
def test_no_file_stays_open_and_no_memory_is_kept(tmp_path):
    names = ["jpeg", "gif", "apng", "turned tiff", "palette", "bmp"]
    for name in names:
        (tmp_path / name).write_bytes(FILES[name]())
    (tmp_path / "cut").write_bytes(FILES["jpeg"]()[:3000])
    kept = []

    def open_all(rounds):
        for _ in range(rounds):
            kept[:] = [open_image(tmp_path / name) for name in names]
            with pytest.raises(BadImage):
                open_image(tmp_path / "cut")

    open_all(2)
    files = len(list(Path("/proc/self/fd").iterdir()))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        resident = resident_bytes()
        open_all(43)
        assert tracemalloc.get_traced_memory()[0] - before < 500_000
    finally:
        tracemalloc.stop()
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    assert resident_bytes() - resident < 30_000_000


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pillow_is_imported_when_it_is_used():
    code = (
        "import sys, ortlm.runtime.multimodal.image_loading\n"
        "assert not {'PIL', 'urllib.request'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
