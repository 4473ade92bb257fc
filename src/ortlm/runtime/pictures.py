"""Pictures in prompts: what they become, and how a decoder that reads embeddings gets them.

A picture's tokens are numbers far above any vocabulary that follow from its content. So a history of ids says all
that a text with pictures is made of: prompts agree as far as their pictures do, and whatever is fed anew finds
them.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import MOST_CROPS, Graph, Images
from ortlm.dtypes import Array
from ortlm.errors import BadArtifact, BadImage, BadOption, ContextFull
from ortlm.runtime.ids import FIRST_PICTURE
from ortlm.runtime.images import ImageSource, hd_crops, hd_size, image_key, open_image, whole_pixels
from ortlm.runtime.multimodal.addresses import Allow
from ortlm.runtime.session import Backend, Tensor

# An id is FIRST_PICTURE, the picture's number in 48 bits, and the token's in these.
_TOKEN_BITS = 14
_TOKEN_MASK = (1 << _TOKEN_BITS) - 1
# Features of pictures that nobody uses at the moment.
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Picture:
    """The embeddings ``features`` [tokens, H] that stand for a picture; ``number`` follows from its content."""

    number: int
    features: Array

    @property
    def ids(self) -> list[int]:
        """The ids of its tokens."""
        first = FIRST_PICTURE | self.number << _TOKEN_BITS
        return list(range(first, first + len(self.features)))


class Pictures:
    """Turns pictures into tokens, by the graph ``vision``, and remembers what it has computed.

    ``open_session`` loads that graph when the first picture comes. ``allow_address``: see ``open_image``.
    A picture of more than ``context_tokens`` is refused before it is cut up.
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
        self._known: OrderedDict[int, Picture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, source: ImageSource, crops: int | None = None) -> Picture:
        """Return what the model sees in ``source``, cut into at most ``crops`` crops.

        Raises BadImage if it cannot be read, BadOption for a number of crops that cannot be.
        """
        images = self.images
        if crops is not None and not images.crops:
            raise BadOption("num_crops does not apply: this model sees pictures as a whole.")
        if crops is not None and not 1 <= crops <= MOST_CROPS:
            raise BadOption(f"num_crops must be 1 to {MOST_CROPS}; got {crops}.")
        most = images.crops if crops is None else crops
        image = open_image(source, allow=self._allow)
        key = f"{image_key(image)} {most}"
        known = self.known(_number(key))
        if known is not None:
            return known
        if images.crops:
            self.check_crops(*image.size, most)
            pixels, size = hd_crops(image, most=most, side=images.side, mean=images.mean, std=images.std)
            return self.add(key, pixels[None], size)
        return self.add(key, whole_pixels(image, side=images.side, mean=images.mean, std=images.std), None)

    def check_crops(self, width: int, height: int, most: int) -> None:
        """Refuse a picture of ``width`` by ``height`` pixels that, cut into ``most`` crops, fits into no prompt.

        Raises ContextFull.
        """
        tokens = self.images.tokens_of(*hd_size(width, height, side=self.images.side, most=most))
        limit = min(1 << _TOKEN_BITS, self._context or sys.maxsize)
        if tokens >= limit:
            raise ContextFull(
                f"the image has {tokens} tokens if it is cut into up to {most} crops, but a prompt holds fewer "
                f"than {limit}. Allow fewer crops with num_crops."
            )

    def add(self, key: str, pixels: NDArray[np.float32], size: tuple[int, int] | None) -> Picture:
        """Return what the model sees in ``pixels`` of ``size`` (height, width); ``key`` names the contents.

        ``pixels`` are [1, 1 + crops, 3, side, side], or [1, 3, side, side] where pictures are not cut.
        """
        number = _number(key)
        known = self.known(number)
        if known is not None:
            return known
        features = self._features(pixels, size)
        if len(features) >= 1 << _TOKEN_BITS:
            raise BadImage(
                f"the picture has {len(features)} tokens; at most {(1 << _TOKEN_BITS) - 1} are possible."
            )
        picture = Picture(number, features)
        with self._lock:
            if number not in self._known:
                self._bytes += features.nbytes
            self._known[number] = picture
            while self._bytes > _KEPT_BYTES and len(self._known) > 1:
                _, oldest = self._known.popitem(last=False)
                self._bytes -= oldest.features.nbytes
        return picture

    def known(self, number: int) -> Picture | None:
        """Return the picture ``number`` if it is remembered."""
        with self._lock:
            found = self._known.get(number)
            if found is not None:
                self._known.move_to_end(number)
            return found

    def _features(self, pixels: NDArray[np.float32], size: tuple[int, int] | None) -> Array:
        with self._lock:
            if self._session is None:
                self._session = self._open()
            session = self._session
        inputs, output = self._graph.inputs, self._graph.outputs["image_features"]
        binding = session.binding()
        kind = session.inputs[inputs["pixel_values"]].dtype.numpy
        binding.input(inputs["pixel_values"], session.place(np.ascontiguousarray(pixels, kind)))
        if size is not None:
            binding.input(
                inputs["image_sizes"],
                session.place(np.array([size], session.inputs[inputs["image_sizes"]].dtype.numpy)),
            )
        binding.output(output, None)
        session.run(binding)
        found = binding.result(output).numpy()
        return found.reshape(-1, found.shape[-1])


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


class Embedder:
    """Token ids to embeddings, by the graph ``embedding``; holds the pictures of one decode loop."""

    def __init__(self, session: Backend, graph: Graph, pictures: Pictures) -> None:
        self._session, self._pictures = session, pictures
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
        self._held: dict[int, Picture] = {}

    def hold(self, rows: Iterable[Sequence[int]]) -> None:
        """Keep the pictures that ``rows`` hold from being forgotten, and no others."""
        wanted: set[int] = set()
        for row in rows:
            wanted |= {_picture_of(token) for token in row if token >= FIRST_PICTURE}
        held = {}
        for number in wanted:
            picture = self._held.get(number) or self._pictures.known(number)
            if picture is not None:  # else it may never be asked for, as in a prompt that was saved
                held[number] = picture
        self._held = held

    def embed(self, ids: NDArray[np.int64]) -> Tensor:
        """Return the embeddings [B, S, H] of ``ids`` int64 [B, S].

        Raises BadOption for a picture that is no longer known.
        """
        features = self._none
        places = ids >= FIRST_PICTURE
        if places.any():
            features = np.stack([self._row(int(token)) for token in ids[places]])
            ids = np.where(places, -1, ids)
        self._binding.input(self._ids, self._session.place(np.ascontiguousarray(ids, self._id_type)))
        self._binding.input(self._features, self._session.place(np.ascontiguousarray(features, self._kind)))
        self._binding.output(self._output, None)
        self._session.run(self._binding, brief=True)
        return self._binding.result(self._output)

    def _row(self, token: int) -> Array:
        picture = self._held.get(_picture_of(token))
        if picture is None:
            raise BadOption(
                "the prompt holds a picture that the model no longer knows. Encode the prompt again, with the "
                "picture."
            )
        row: Array = picture.features[token & _TOKEN_MASK]
        return row


def _picture_of(token: int) -> int:
    return (token ^ FIRST_PICTURE) >> _TOKEN_BITS


# --- prompts ------------------------------------------------------------------------------------------------


def tag_pattern(images: Images) -> re.Pattern[str]:
    """Return what finds the tags of pictures in a text; its group is the number, if tags have numbers."""
    before, numbered, after = images.tag.partition("{}")
    return re.compile(re.escape(before) + (r"(\d+)" if numbered else "") + re.escape(after))


def split(text: str, images: Images, count: int) -> list[str]:
    """Return the texts around ``count`` pictures whose tags stand in ``text``, one more than there are pictures.

    Raises BadOption unless there are so many tags, with the numbers 1, 2, 3 … in this order.
    """
    pattern = tag_pattern(images)
    found = list(pattern.finditer(text))
    if len(found) != count:
        raise BadOption(
            f"the prompt has {len(found)} image tags, but {count} images were given. Each image needs one tag, "
            f"{' '.join(images.tag.format(i) for i in (1, 2))} … in this order, or give messages without any."
        )
    if pattern.groups:
        numbers = [int(match[1]) for match in found]
        if numbers != list(range(1, count + 1)):
            raise BadOption(
                f"the prompt's image tags have the numbers {', '.join(map(str, numbers))}; they must be 1 to "
                f"{count}, in this order: the model takes images in the order of the text."
            )
    texts, at = [], 0
    for match in found:
        texts.append(text[at : match.start()])
        at = match.end()
    return [*texts, text[at:]]


_KINDS = ("image", "image_url", "input_image")


def picture_of(part: Any) -> ImageSource | None:
    """Return the picture in a part of a message's content, None if it is something else.

    Parts are {"type": "image", "image": …} or, as in OpenAI's API, {"type": "image_url", "image_url": {"url": …}}.
    Raises BadOption for one without a picture.
    """
    if not isinstance(part, dict) or part.get("type") not in _KINDS:
        return None
    for key in ("image", "image_url", "url", "path"):
        found = part.get(key)
        if isinstance(found, dict):
            found = found.get("url")
        if found is not None:
            source: ImageSource = found
            return source
    raise BadOption(
        'a content part of type "image" needs the picture: {"type": "image", "image": PATH, URL, bytes, Pillow '
        "image or numpy array}."
    )


def flatten(messages: Sequence[Any], images: Images) -> tuple[list[Any], list[ImageSource]]:
    """Return ``messages`` with their pictures taken out, and those, in order.

    Where tags have numbers, a tag and a line break take a picture's place, and contents become texts; else the
    template writes the tag for {"type": "image"}.
    """
    sources: list[ImageSource] = []
    out: list[Any] = []
    numbered = "{}" in images.tag
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            out.append(message)
            continue
        parts: list[Any] = []
        for part in content:
            source = picture_of(part)
            if source is None:
                parts.append(part)
                continue
            sources.append(source)
            tag = f"{images.tag.format(len(sources))}\n"
            parts.append({"type": "text", "text": tag} if numbered else {"type": "image"})
        out.append({**message, "content": parts})
    return out, sources


# --- pictures that are fed as a whole -----------------------------------------------------------------------


def picture_numbers(ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for ``ids`` int64 [B, S] which are of the same picture: its number from 1, and 0 for words.

    ``counts`` are the lengths of the rows, behind which there is padding. Pictures with the same content are told
    apart, because a picture's tokens begin with its first.
    """
    places = (ids >= FIRST_PICTURE) & (np.arange(ids.shape[1]) < counts[:, None])
    begins = places & (ids & _TOKEN_MASK == 0)
    begins[:, 0] |= places[:, 0]
    return np.where(places, np.cumsum(begins, axis=1), 0)


def between_pictures(rows: Sequence[Sequence[int]], end: int) -> int:
    """Return the first place from ``end`` on where no row is within a picture."""
    while any(
        end < len(row)
        and row[end] >= FIRST_PICTURE
        and row[end] & _TOKEN_MASK
        and row[end - 1] == row[end] - 1
        for row in rows
    ):
        end += 1
    return end


def begun_picture(history: Sequence[int]) -> int:
    """Return how many tokens of a picture end ``history``, 0 if it ends with a word."""
    if not history or history[-1] < FIRST_PICTURE:
        return 0
    return min(len(history), (history[-1] & _TOKEN_MASK) + 1)
