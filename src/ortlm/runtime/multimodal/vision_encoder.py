"""Images in prompts: what they become, and how a decoder that reads embeddings gets them.

An image's tokens are numbers far above any vocabulary that follow from its content. So a history of ids says all
that a text with images is made of: prompts agree as far as their images do, and whatever is fed again finds
them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import GRID, MOST_CROPS, Graph, Images, Patches
from ortlm.dtypes import Array
from ortlm.errors import BadArtifact, BadImage, BadOption, ContextFull
from ortlm.runtime.engine.backend import Backend, DeviceTensor
from ortlm.runtime.engine.token_ids import (
    FIRST_IMAGE_TOKEN,
    MOST_COLUMNS,
    TOKEN_BITS,
    TOKEN_MASK,
    image_number,
    image_of_token,
)
from ortlm.runtime.multimodal.addresses import Allow
from ortlm.runtime.multimodal.image_loading import ImageSource, image_key, open_image
from ortlm.runtime.multimodal.image_processor import (
    even_crops,
    hd_crops,
    hd_size,
    padded_crops,
    patch_grid,
    patch_pixels,
    scanned,
    whole_pixels,
)

if TYPE_CHECKING:
    from PIL import Image

# Features of images that nobody uses at the moment.
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The embeddings ``features`` [tokens, H] of an image; ``number`` follows from its content, ``key``."""

    number: int
    features: Array
    key: str

    @property
    def ids(self) -> list[int]:
        """The ids of its tokens."""
        first = FIRST_IMAGE_TOKEN | self.number << TOKEN_BITS
        return list(range(first, first + len(self.features)))


class VisionEncoder:
    """Turns images into tokens, by the graph ``vision``, and remembers what it has computed.

    ``open_session`` loads that graph when the first image comes. ``allow_address``: see ``open_image``.
    An image of more than ``context_tokens`` is refused before it is cut up.
    """

    def __init__(
        self,
        images: Images,
        graph: Graph,
        open_session: Callable[[], Backend],
        allow_address: Allow | None = None,
        context_tokens: int | None = None,
    ) -> None:
        self.images = images
        self._context = context_tokens
        self._allow = allow_address
        self._graph = graph
        self._open = open_session
        self._session: Backend | None = None
        self._known: OrderedDict[int, EncodedImage] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, source: ImageSource, crops: int | None = None) -> list[EncodedImage]:
        """Return what the model sees in ``source``, cut into at most ``crops`` crops.

        That is one image, and after it its crops where those are images of their own (``pan_and_scan``). Raises
        BadImage if it cannot be read, BadOption for a number of crops that cannot be, ContextFull for an image
        that fits into no prompt.
        """
        images, scan = self.images, self.images.pan_and_scan
        if crops is not None and not (images.tiled or scan):
            raise BadOption("num_crops does not apply: this model sees images as a whole.")
        least = 0 if scan else 1
        if crops is not None and not least <= crops <= MOST_CROPS:
            raise BadOption(f"num_crops must be {least} to {MOST_CROPS}; got {crops}.")
        most = images.crops if crops is None else crops
        image = open_image(source, allow=self._allow)
        if images.patches is not None:
            return [self._read_patches(image, images.patches)]
        if scan is None:
            return [self._read_whole(image, most)]
        views = [image, *scanned(image, most=most, scan=scan)]
        limit = self._context or sys.maxsize
        if len(views) * images.tokens >= limit:
            raise ContextFull(
                f"the image has {len(views) * images.tokens} tokens with its {len(views) - 1} crops, but a prompt "
                f"holds fewer than {limit}. Allow fewer crops with num_crops."
            )
        return [self._read_whole(view, 0) for view in views]

    def _read_whole(self, image: Image.Image, most: int) -> EncodedImage:
        """Return what the model sees in an image of which it knows one view, or that and ``most`` crops."""
        images = self.images
        key = f"{image_key(image)} {most}"
        known = self._found(key, image_number(key))
        if known is not None:
            return known
        if images.patch:
            return self._read_padded(image, key, most)
        if images.tiled:
            self.check_crops(*image.size, most)
            pixels, size = hd_crops(image, most=most, side=images.side, mean=images.mean, std=images.std)
            return self.add(key, pixels[None], size)
        return self.add(key, whole_pixels(image, side=images.side, mean=images.mean, std=images.std), None)

    def _read_padded(self, image: Image.Image, key: str, most: int) -> EncodedImage:
        """Return what the model sees in an image and ``most`` crops, of which padding is left out."""
        images = self.images
        crops = even_crops(*image.size, side=images.side, patch=images.patch, most=most)
        each = images.side // images.patch // images.merged
        rows, columns = (math.ceil(count / each) for count in crops.patches)
        tokens = rows * (columns + 1) + 1 + images.merged * (images.merged + 1)
        self._check_tokens(tokens, most)
        pixels = padded_crops(image, crops, side=images.side, mean=images.mean, std=images.std)
        features = self._features(pixels[None], image_sizes=crops.size, image_patches=crops.patches)
        return self._keep(key, image_number(key), features)

    def _read_patches(self, image: Image.Image, patches: Patches) -> EncodedImage:
        """Return what the model sees in an image of any size.

        Raises BadImage for a shape that cannot be, ContextFull for an image that fits into no prompt.
        """
        rows, columns = (n // patches.merge for n in patch_grid(*image.size, patches))
        limit = min((1 << TOKEN_BITS) + 1, self._context or sys.maxsize)
        if rows * columns >= limit or columns > MOST_COLUMNS:
            raise ContextFull(
                f"the image has {rows * columns} tokens, {columns} in a row, but a prompt holds fewer than "
                f"{limit}, and a row {MOST_COLUMNS} at most. Make the image smaller."
            )
        key = f"{image_key(image)} patches"
        columns = columns if self.images.positions == GRID else 0
        known = self._found(key, image_number(key, columns))
        if known is not None:
            return known
        pixels, grid = patch_pixels(image, patches, mean=self.images.mean, std=self.images.std)
        return self._keep(key, image_number(key, columns), self._features(pixels, image_grid_thw=(1, *grid)))

    def check_crops(self, width: int, height: int, most: int) -> None:
        """Refuse an image of ``width`` by ``height`` pixels that, cut into ``most`` crops, fits into no prompt.

        Raises ContextFull.
        """
        self._check_tokens(
            self.images.tokens_of(*hd_size(width, height, side=self.images.side, most=most)), most
        )

    def _check_tokens(self, tokens: int, most: int) -> None:
        limit = min(1 << TOKEN_BITS, self._context or sys.maxsize)
        if tokens >= limit:
            raise ContextFull(
                f"the image has {tokens} tokens if it is cut into up to {most} crops, but a prompt holds fewer "
                f"than {limit}. Allow fewer crops with num_crops."
            )

    def add(self, key: str, pixels: NDArray[np.float32], size: tuple[int, int] | None) -> EncodedImage:
        """Return what the model sees in ``pixels`` of ``size`` (height, width); ``key`` names the contents.

        ``pixels`` are [1, 1 + crops, 3, side, side], or [1, 3, side, side] where images are not cut.
        """
        number = image_number(key)
        known = self._found(key, number)
        if known is not None:
            return known
        return self._keep(key, number, self._features(pixels, image_sizes=size))

    def _keep(self, key: str, number: int, features: Array) -> EncodedImage:
        """Remember what was computed, and let go of what is too much."""
        if len(features) > 1 << TOKEN_BITS:
            raise BadImage(f"the image has {len(features)} tokens; at most {1 << TOKEN_BITS} are possible.")
        image = EncodedImage(number, features, key)
        with self._lock:
            if number not in self._known:
                self._bytes += features.nbytes
            self._known[number] = image
            while self._bytes > _KEPT_BYTES and len(self._known) > 1:
                _, oldest = self._known.popitem(last=False)
                self._bytes -= oldest.features.nbytes
        return image

    def _found(self, key: str, number: int) -> EncodedImage | None:
        """Return the image with the contents ``key`` if it is remembered; BadImage if it is taken for another."""
        known = self.known(number)
        if known is not None and known.key != key:
            raise BadImage("the image cannot be told from another one that is in use. Change a pixel of it.")
        return known

    def known(self, number: int) -> EncodedImage | None:
        """Return the image ``number`` if it is remembered."""
        with self._lock:
            known = self._known.get(number)
            if known is not None:
                self._known.move_to_end(number)
            return known

    def _features(self, pixels: NDArray[np.float32], **sizes: tuple[int, ...] | None) -> Array:
        """Return the features [tokens, H] of one image; ``sizes`` are inputs that say how its pixels lie."""
        with self._lock:
            if self._session is None:
                self._session = self._open()
            session = self._session
        inputs, output = self._graph.inputs, self._graph.outputs["image_features"]
        binding = session.binding()
        kind = session.inputs[inputs["pixel_values"]].dtype.numpy
        binding.input_array(inputs["pixel_values"], np.ascontiguousarray(pixels, kind))
        for role, size in sizes.items():
            if size is not None:
                binding.input_array(inputs[role], np.array([size], session.inputs[inputs[role]].dtype.numpy))
        binding.output(output, None, to_host=True)
        session.run(binding)
        features = binding.result(output).numpy()
        return features.reshape(-1, features.shape[-1])


class Embedder:
    """Token ids to embeddings, by the graph ``embedding``; holds the images of one decode loop."""

    def __init__(self, session: Backend, graph: Graph, images: VisionEncoder) -> None:
        self._session, self._vision_encoder = session, images
        self._ids, self._features = graph.inputs["input_ids"], graph.inputs["image_features"]
        self._output = graph.outputs["inputs_embeds"]
        self._binding = session.binding()
        self._id_type = session.inputs[self._ids].dtype.numpy
        info = session.inputs[self._features]
        self._kind = info.dtype.numpy
        width = info.shape[-1] or session.outputs[self._output].shape[-1]
        if width is None:
            raise BadArtifact("the graph that embeds tokens does not say how wide its embeddings are.")
        self._none = np.zeros((0, width), self._kind)
        self._held: dict[int, EncodedImage] = {}

    def hold(self, rows: Iterable[Sequence[int]]) -> None:
        """Keep the images that ``rows`` hold from being forgotten, and no others."""
        wanted: set[int] = set()
        for row in rows:
            wanted |= {image_of_token(token) for token in row if token >= FIRST_IMAGE_TOKEN}
        held = {}
        for number in wanted:
            image = self._held.get(number) or self._vision_encoder.known(number)
            if image is not None:  # else it may never be asked for, as in a prompt that was saved
                held[number] = image
        self._held = held

    def embed(self, ids: NDArray[np.int64]) -> DeviceTensor:
        """Return the embeddings [B, S, H] of ``ids`` int64 [B, S].

        Raises BadOption for an image that is no longer known.
        """
        features = self._none
        places = ids >= FIRST_IMAGE_TOKEN
        if places.any():
            features = np.stack([self._row(int(token)) for token in ids[places]])
            ids = np.where(places, -1, ids)
        self._binding.input_array(self._ids, np.ascontiguousarray(ids, self._id_type))
        self._binding.input_array(self._features, np.ascontiguousarray(features, self._kind))
        self._binding.output(self._output, None)
        self._session.run(self._binding, brief=True)
        return self._binding.result(self._output)

    def _row(self, token: int) -> Array:
        image = self._held.get(image_of_token(token))
        if image is None:
            raise BadOption(
                "the prompt holds an image that the model no longer knows. Encode the prompt again, with the "
                "image."
            )
        row: Array = image.features[token & TOKEN_MASK]
        return row


# --- prompts ------------------------------------------------------------------------------------------------


# --- images that are fed as a whole -----------------------------------------------------------------------
