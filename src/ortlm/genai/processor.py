"""Prompts with images to the inputs of a Generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ortlm.genai.errors import GenaiError, official
from ortlm.genai.handle import HasHandle
from ortlm.genai.media import Audios, Images
from ortlm.genai.tensors import NamedTensors, Tensor
from ortlm.genai.tokenizer import Tokenizer, TokenizerStream
from ortlm.runtime.multimodal.image_loading import open_image
from ortlm.runtime.multimodal.image_processor import hd_crops
from ortlm.runtime.multimodal.image_tags import split
from ortlm.runtime.multimodal.vision_encoder import EncodedImage, VisionEncoder


class MultiModalProcessor:
    """What ``Model.create_multimodal_processor`` returns. Raises GenaiError for models without crops."""

    @official
    def __init__(self, model: HasHandle) -> None:
        lm = model._handle.lm
        encoder = lm.vision_encoder
        kind = model._handle.config.model_type
        if encoder is None:
            raise GenaiError(
                f"a {kind} model takes text only, so there is no processor for images or sound. Use Tokenizer and "
                "Generator.append_tokens."
            )
        if not encoder.images.tiled or encoder.images.patch:
            raise GenaiError(
                f"ortlm.genai has a processor for images in crops only, and a {kind} model sees them otherwise. "
                "Give the images to ortlm.load(...).generate, or use onnxruntime-genai."
            )
        self._tokenizer, self._vision_encoder = Tokenizer(model), encoder
        self._encode = lm.tokenizer.encode
        self._pad = lm.manifest.pad_token_id or 0

    @official
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        images: Images | None = None,
        audios: Audios | None = None,
    ) -> NamedTensors:
        """Return the inputs for ``Generator.set_inputs`` of a prompt that has a tag for each image.

        ``input_ids`` int32 [1, S], with -1 for the first image's tokens, -2 for the second's; ``pixel_values``
        float32 [images, 1 + crops, 3, side, side] and ``image_sizes`` int64 [images, 2]; ``num_image_tokens``
        int64 [images]. Several prompts, without images, give a row each. Raises GenaiError for tags that do
        not fit the images.
        """
        if audios is not None:
            raise GenaiError("this model hears nothing: leave audios out.")
        if prompt is None:
            raise GenaiError("give a prompt, with a tag for each image.")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        contents = images.contents if images is not None else []
        if len(texts) != 1 and contents:
            raise GenaiError(f"images go with one prompt, found {len(texts)}. Process one after the other.")
        rule = self._vision_encoder.images
        inputs = NamedTensors()
        seen = []
        for content in contents:
            image = open_image(content)
            self._vision_encoder.check_crops(*image.size, rule.crops)
            seen.append(hd_crops(image, most=rule.crops, side=rule.side, mean=rule.mean, std=rule.std))
        counts = [rule.tokens_of(*size) for _, size in seen]
        rows = []
        for text in texts:
            ids: list[int] = []
            for number, part in enumerate(split(text, rule, len(contents))):
                ids += self._encode(part)
                ids += [-1 - number] * counts[number] if number < len(counts) else []
            rows.append(ids)
        width = max(map(len, rows), default=0)
        filled = [[*row, *[self._pad] * (width - len(row))] for row in rows]
        inputs["input_ids"] = Tensor(np.array(filled, np.int32), lengths=[len(row) for row in rows])
        if seen:
            most = max(len(pixels) for pixels, _ in seen)
            values = np.zeros((len(seen), most, *seen[0][0].shape[1:]), np.float32)
            for place, (pixels, _) in zip(values, seen, strict=True):
                place[: len(pixels)] = pixels
            inputs["pixel_values"] = values
            inputs["image_sizes"] = np.array([size for _, size in seen], np.int64)
            inputs["num_image_tokens"] = np.array(counts, np.int64)
        return inputs

    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(tokens)

    def create_stream(self) -> TokenizerStream:
        """Return a stream that decodes one token after the other."""
        return self._tokenizer.create_stream()


def images_of(inputs: NamedTensors, encoder: VisionEncoder) -> list[EncodedImage]:
    """Return the images whose pixels are in ``inputs``. Raises GenaiError if something is missing."""
    if "pixel_values" not in inputs:
        return []
    if "image_sizes" not in inputs:
        raise GenaiError("pixel_values need image_sizes with them, int64 [images, 2].")
    pixels: NDArray[Any] = np.ascontiguousarray(inputs["pixel_values"].as_numpy(), np.float32)
    sizes = inputs["image_sizes"].as_numpy().reshape(-1, 2).astype(int).tolist()
    side = encoder.images.side
    if pixels.ndim != 5 or pixels.shape[2:] != (3, side, side) or len(pixels) != len(sizes):
        raise GenaiError(
            f"pixel_values must be [images, views, 3, {side}, {side}] and image_sizes [images, 2]; found "
            f"{list(pixels.shape)} and {len(sizes)} sizes."
        )
    ids = []
    for views, (high, wide) in zip(pixels, sizes, strict=True):
        used = 1 + (high // side) * (wide // side)
        if high % side or wide % side or not 1 < used <= len(views):
            raise GenaiError(f"{len(views)} views cannot be an image of {wide} x {high} pixels.")
        own = np.ascontiguousarray(views[:used])
        key = f"{hashlib.blake2b(own.data).hexdigest()} {high} {wide}"
        ids.append(encoder.add(key, own[None], (high, wide)))
    return ids
