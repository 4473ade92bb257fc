"""Damaged files of images end in an image or in BadImage."""

from __future__ import annotations

import io

from hypothesis import strategies as st
from PIL import Image, features

from ortlm.runtime.multimodal.image_loading import open_image
from tests.fuzz.harness import damaged_bytes, fuzz


def _saved(form: str, mode: str = "RGB", **options: object) -> bytes:
    image = Image.linear_gradient("L").resize((23, 17)).convert(mode)
    with io.BytesIO() as file:
        image.save(file, form, **options)
        return file.getvalue()


_GIF = {"save_all": True, "append_images": [Image.new("P", (23, 17), 3)] * 2}
FILES = [
    _saved("PNG"), _saved("PNG", "P"), _saved("PNG", "I;16"), _saved("PNG", "LA"), _saved("PNG", "1"),
    _saved("PNG", save_all=True, append_images=[Image.new("RGB", (23, 17))]),
    _saved("JPEG"), _saved("JPEG", "CMYK"), _saved("JPEG", progressive=True, comment=b"x"),
    _saved("GIF", "P", **_GIF), _saved("BMP"), _saved("BMP", "P"), _saved("BMP", "1"),
    _saved("TIFF"), _saved("TIFF", compression="tiff_lzw"), _saved("TIFF", "CMYK"), _saved("TIFF", "I;16"),
    _saved("PPM"), _saved("PPM", "1"), b"P3\n2 1\n255\n1 2 3 4 5 6\n",
    *([_saved("WEBP"), _saved("WEBP", "RGBA", lossless=True)] if features.check("webp") else []),
    *([_saved("JPEG2000")] if features.check("jpg_2000") else []),
    *([_saved("AVIF")] if "avif" in features.get_supported_modules() else []),
]  # fmt: skip


@fuzz(st.sampled_from(FILES).flatmap(damaged_bytes))
def test_image(raw):
    image = open_image(raw, most_pixels=1_000_000)
    assert image.mode == "RGB"
    assert image.width * image.height <= 1_000_000


@fuzz(st.sampled_from(FILES[:3]).flatmap(damaged_bytes).map(lambda raw: "data:image/png;base64," + raw.hex()))
def test_data_url(url):
    open_image(url, most_pixels=1_000_000)
