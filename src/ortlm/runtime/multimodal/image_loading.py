"""Images to the arrays that a vision encoder takes.

``open_image`` reads an image from wherever it is; ``hd_crops`` and ``whole_pixels`` are the two ways in which
models look at it. Source of the semantics: the processors of Phi-3.5-vision and Gemma 3.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ortlm._utils.formatting import readable_bytes
from ortlm.errors import BadImage, BadOption

if TYPE_CHECKING:
    from PIL import Image

    from ortlm.runtime.multimodal.addresses import Allow

ImageSource: TypeAlias = "str | Path | bytes | bytearray | memoryview | Image.Image | NDArray[Any]"

# Pillow reads more, but some of that runs other programs (EPS) and hardly any of it is ever sent. HEIF is there if
# the caller has registered a plugin for it.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 and AVIF"
_SOURCES = (
    "a path, an http(s):// or data: URL, the bytes of an image's file, a PIL image, "
    "or an array of uint8 with the shape [height, width] or [height, width, 1, 3 or 4]"
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NO_URL = re.compile(r"https?:", re.IGNORECASE)
# Besides these, servers that do not know better call images so.
_MEDIA = ("image/", "application/octet-stream", "binary/octet-stream")
_ORIENTATION = 0x0112
_KEY_TILE = 4096
# No image is longer; Pillow needs memory for pointers to every line of it.
_MOST_SIDE = 65_535
# How many pieces of a file may be read, and one more for so many of its bytes. Encoders write 8 kB at a time,
# which take three reads.
_READS, _READS_BYTES = 50_000, 256
# Progressive files have ten or so, each of which goes over all pixels.
_JPEG_SCANS, _JPEG_WORK = 20, 300_000_000
# Numbers in plain text are read one by one.
_PLAIN_PPM, _PLAIN_PPM_BYTES = (b"P1", b"P2", b"P3"), 4 << 20


def open_image(
    source: ImageSource,
    *,
    most_pixels: int = 100_000_000,
    most_bytes: int = 64 << 20,
    timeout: float = 20.0,
    allow: Allow | None = None,
) -> Image.Image:
    """Return the image that ``source`` is or names, as a new PIL image in mode RGB.

    A ``str`` is a path or a URL (http, https, data); bytes are those of a file. Of an animation the first frame is
    taken; the orientation that EXIF names is applied, transparency is dropped. ``timeout`` is in seconds, for all
    of a download. ``allow`` is for servers: it says of every address of the network whether a URL may lead there
    (``public_address``, or ``no_address`` for none), and with it a ``str`` is never a path. Raises BadImage if
    there is no image or it is larger than allowed, which is known before it is decoded; BadOption if ``source`` is
    nothing of the kind.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _as_rgb(source, "the PIL image", most_pixels)
    if isinstance(source, np.ndarray):
        return _as_rgb(_from_array(source, most_pixels), "the array", most_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        name, size = "the image in bytes", memoryview(source).nbytes
        _check_bytes(size, most_bytes, name)
        return _decode(bytes(source), name, most_pixels)
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            name = "the data: URL"
            return _decode(_from_data_url(source, most_bytes, name), name, most_pixels)
        if scheme := _URL.match(source):
            from ortlm.runtime.multimodal.download import download, shown_url

            name = shown_url(source)
            if scheme[1].lower() not in ("http", "https"):
                raise BadImage(
                    f"{name} cannot be opened: images come from http://, https:// and data: URLs and from "
                    f"paths, not from {scheme[1]}://. Give the path itself if it is a file here."
                )
            if not timeout > 0:
                raise BadOption(f"timeout must be more than 0 seconds, found {timeout}.")
            from ortlm.runtime.multimodal.addresses import no_address

            if allow is no_address:
                raise BadImage(
                    f"{name} is not fetched: no images are, here. Send the image itself in a data: URL."
                )
            content = download(source, most_bytes=most_bytes, timeout=timeout, name=name, allow=allow)
            return _decode(content, name, most_pixels)
        if _NO_URL.match(source):
            from ortlm.runtime.multimodal.download import shown_url

            raise BadImage(
                f"{shown_url(source)} cannot be fetched: an address begins with http:// or https://."
            )
        if allow is not None:
            raise BadImage("an image that is given as a text must be an http(s):// or a data: URL here.")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        name = _short(str(path))
        return _decode(_read(path, most_bytes, name), name, most_pixels)
    raise BadOption(f"an image must be {_SOURCES}; found {type(source).__name__}.")


def image_key(image: Image.Image) -> str:
    """Return a name for the contents of an RGB ``image``, the same for the same size and pixels."""
    _check_rgb(image)
    width, height = image.size
    digest = hashlib.blake2b(f"{width}x{height}".encode(), digest_size=16)
    # In pieces: the bytes of the whole would be there once more.
    for top in range(0, height, _KEY_TILE):
        for left in range(0, width, _KEY_TILE):
            box = (left, top, min(left + _KEY_TILE, width), min(top + _KEY_TILE, height))
            digest.update(image.crop(box).tobytes())
    return digest.hexdigest()


def _read(path: Path, most_bytes: int, name: str) -> bytes:
    """Return the bytes of a file. Raises BadImage."""
    try:
        if not path.is_file():
            raise BadImage(_not_a_file(path, name))
        with path.open("rb") as file:
            _check_bytes(os.fstat(file.fileno()).st_size, most_bytes, name)
            return file.read(most_bytes)
    except (OSError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadImage(
            f"{name} cannot be read as an image: {reason}. An image must be {_SOURCES}."
        ) from error


def _not_a_file(path: Path, name: str) -> str:
    if path.is_dir():
        return f"{name} is a folder; give the path of one image in it."
    if path.exists():
        return f"{name} is no ordinary file; give the path of an image, or its bytes."
    return f"{name} does not exist. An image must be {_SOURCES}."


def _from_data_url(url: str, most_bytes: int, name: str) -> bytes:
    """Return the bytes that a data: URL holds. Raises BadImage."""
    import base64
    import binascii
    from urllib.parse import unquote_to_bytes

    head, comma, body = url[5:].partition(",")
    if not comma:
        raise BadImage(f"{name} has no comma; it must look like data:image/png;base64,iVBORw0...")
    # A character of base64 may be written as three.
    _check_bytes(len(body) // 4, most_bytes, name)
    media, *flags = (part.strip().lower() for part in head.split(";"))
    if media and not media.startswith(_MEDIA):
        raise BadImage(f"{name} holds {media!r}, not an image; its type must be like image/png.")
    data = unquote_to_bytes(body)
    if "base64" in flags:
        plain = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        try:
            data = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
        except binascii.Error as error:
            raise BadImage(f"{name} holds damaged base64: {error}. Encode the image's file again.") from error
    _check_bytes(len(data), most_bytes, name)
    return data


def _decode(data: bytes, name: str, most_pixels: int) -> Image.Image:
    """Return the first frame of the file whose bytes are ``data``. Raises BadImage."""
    if not data:
        raise BadImage(f"{name} is empty: 0 bytes. Give an image's file; {_KINDS} can be read.")
    with _Counted(data) as stream:
        stream.name, stream.left = name, _READS + len(data) // _READS_BYTES
        header = _open_header(stream, name)
        _check_work(data, header, name)
        return _as_rgb(header, name, most_pixels)


class _Counted(io.BytesIO):
    """Bytes of a file that may be read in so many pieces.

    Formats are lists of pieces, and Pillow looks at each of them. A file of a million empty ones would keep it
    busy for longer than any image.
    """

    name = ""
    left = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().readline(size)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise BadImage(
                f"{self.name} consists of too many pieces, such as comments. Save it again with another program."
            )


def _check_work(data: bytes, header: Image.Image, name: str) -> None:
    """Refuse a file that takes long to decode for its number of pixels. Raises BadImage."""
    if header.format == "JPEG":
        scans = data.count(b"\xff\xda")
        if scans > _JPEG_SCANS and scans * header.width * header.height > _JPEG_WORK:
            raise BadImage(f"{name} has {scans} scans, more than any JPEG of its size needs. Save it again.")
    if header.format == "PPM" and data[:2] in _PLAIN_PPM and len(data) > _PLAIN_PPM_BYTES:
        raise BadImage(
            f"{name} is a PPM in plain text of {readable_bytes(len(data))}; at most "
            f"{readable_bytes(_PLAIN_PPM_BYTES)} are read. Save it in binary form, or as PNG."
        )


def _open_header(stream: io.BytesIO, name: str) -> Image.Image:
    """Return an image of which only the header is read.

    ``PIL.Image.open`` would do the same, and then warn of large images by a limit that is global.
    """
    from PIL import Image

    Image.init()
    prefix = stream.read(16)
    for form in _FORMATS:
        factory, accepts = Image.OPEN.get(form, (None, None))
        # Filled up, because some look at bytes that a very short file has not.
        accepted = accepts is not None and accepts(prefix.ljust(16, b"\0"))
        if factory is None or not accepted:
            continue
        if isinstance(accepted, str):
            raise BadImage(f"{name} is {form}, which this Pillow cannot decode: {accepted}.")
        stream.seek(0)
        try:
            return factory(stream, "")
        except Image.DecompressionBombError as error:
            raise BadImage(f"{name} is larger than allowed: {_said(error)}. Make it smaller.") from error
        except BadImage:
            raise
        # What damaged headers do to Pillow's plugins is of every kind.
        except Exception as error:
            raise BadImage(
                f"{name} is damaged: its {form} header cannot be read ({_said(error)}). Make the file again."
            ) from error
    raise BadImage(
        f"{name} is no image that can be read: it begins with {prefix[:8]!r}. "
        f"{_KINDS} can be read; convert it to one of them."
    )


def _from_array(array: NDArray[Any], most_pixels: int) -> Image.Image:
    """Return an array of pixels as an image. Raises BadOption."""
    from PIL import Image

    allowed = "Allowed is uint8 with the shape [height, width] or [height, width, 1, 3 or 4]"
    if array.dtype != np.uint8:
        hint = (
            "convert values to 0..255, round them and use .astype(numpy.uint8)"
            if array.dtype.kind == "f"
            else "convert it with .astype(numpy.uint8) if its values are within 0..255"
        )
        raise BadOption(f"an image's array has the type {array.dtype}. {allowed}; {hint}.")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = (
            "; channels come last: use array.transpose(1, 2, 0)."
            if array.ndim == 3 and array.shape[0] in (1, 3, 4)
            else "; give one image at a time."
        )
        raise BadOption(f"an image's array has the shape {list(array.shape)}. {allowed}{hint}")
    height, width = array.shape[:2]
    _check_pixels(width, height, most_pixels, "the array")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _as_rgb(image: Image.Image, name: str, most_pixels: int) -> Image.Image:
    """Return a new image in mode RGB, upright, with nothing but its pixels. Raises BadImage."""
    _check_pixels(*image.size, most_pixels, name)
    try:
        _load(image)
        # After loading, because some formats are turned then and forget their orientation.
        turn = _turn(image)
        rgb = _eight_bits(image, name)
        if rgb.mode == "P" and "transparency" in rgb.info:
            # Pillow would warn that it is dropped.
            rgb = rgb.copy()
            del rgb.info["transparency"]
        if rgb.mode != "RGB":
            rgb = rgb.convert("RGB")
        if turn is not None:
            rgb = rgb.transpose(turn)
        elif rgb is image:
            rgb = rgb.copy()
    except BadImage:
        raise
    # Damaged data makes Pillow raise nearly anything.
    except Exception as error:
        raise BadImage(
            f"{name} is damaged or cut off: its {image.format or image.mode} data cannot be decoded "
            f"({_said(error)}). Make the file again."
        ) from error
    # An image that is opened twice must not be turned twice.
    rgb.info = {}
    return rgb


def _load(image: Image.Image) -> None:
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or image.width * image.height <= limit:
        image.load()
        return
    # Filters belong to the whole process, so they are touched only where some plugins warn once more.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes ``image`` upright, as ``PIL.ImageOps.exif_transpose`` does."""
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION)
    # Notes on an image may be damaged where its pixels are not.
    except Exception:
        return None
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return turns.get(orientation) if isinstance(orientation, int) else None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Return ``image``, in mode L if its values have 16 bits."""
    from PIL import Image

    wide = image.mode == "I" or image.mode.startswith("I;16")
    if image.mode == "F":
        raise BadImage(
            f"{name} has pixels in floating point, of which nobody knows what is white; save 8 bits."
        )
    if not wide:
        return image
    # Pillow's convert cuts 16 bits off at 255, which leaves a white page. Of colors with 16 bits it keeps the
    # high byte, and so do we.
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadImage(
            f"{name} has values from {low} to {high}; allowed are 0..65535. Save it with 8 or 16 bits."
        )
    if image.mode == "I" and image.format is None and high <= 255:
        # 32 bits that hold 8: what Image.convert("I") makes, and no file.
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray((values >> 8).astype(np.uint8))


def _check_bytes(count: int, most_bytes: int, name: str) -> None:
    if count > most_bytes:
        raise BadImage(
            f"{name} has more than the {readable_bytes(most_bytes)} that are allowed (most_bytes={most_bytes}); "
            "make the image smaller or allow more."
        )


def _check_pixels(width: int, height: int, most_pixels: int, name: str) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"{name} is {width} x {height} pixels; both must be at least 1.")
    if max(width, height) > _MOST_SIDE:
        raise BadImage(
            f"{name} is {width} x {height} pixels; a side may have at most {_MOST_SIDE}. Cut it into parts."
        )
    if width * height > most_pixels:
        raise BadImage(
            f"{name} is {width} x {height} pixels, more than the {most_pixels / 1e6:g} million that are allowed "
            f"(most_pixels={most_pixels}); make it smaller or allow more."
        )


def _check_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise BadOption(
            f"an image has the mode {image.mode!r} where 'RGB' is needed; use open_image on it first."
        )


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(". ")
