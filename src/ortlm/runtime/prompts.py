"""Prompts of all kinds to token ids: texts, chat messages, either with images, and ids themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Union, cast

import numpy as np

from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.multimodal.image_loading import ImageSource
from ortlm.runtime.multimodal.image_tags import flatten, image_of, placeholder, split
from ortlm.runtime.multimodal.vision_encoder import VisionEncoder
from ortlm.runtime.text.tokenizer import Tokenizer
from ortlm.runtime.text.types import Message

if TYPE_CHECKING:
    from ortlm.runtime.text.chat_template import ChatTemplate

Prompt = Union[str, Sequence[Message], Sequence[int]]  # noqa: UP007 - evaluated at run time


class TokenizerReader:
    """Reads the tokenizer in ``folder``: when it is asked for, or before that, in another thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: Future[Tokenizer] | None = None

    def begin(self) -> None:
        """Begin to read. Nothing is raised before somebody asks."""
        found: Future[Tokenizer] = Future()

        def work() -> None:
            try:
                tokenizer = Tokenizer.open(self._folder)
                # Every generation asks for them. What is wrong with them is said there.
                with suppress(BadArtifact):
                    _ = tokenizer.ids
                found.set_result(tokenizer)
            except BaseException as error:
                found.set_exception(error)

        Thread(target=work, name="tokenizer").start()
        self._found = found

    def read(self) -> Tokenizer:
        """Return the tokenizer. Raises BadArtifact if there is none that can be read."""
        return Tokenizer.open(self._folder) if self._found is None else self._found.result()


class Prompts:
    """Turns prompts into token ids for the artifact in ``folder``, with images if it has a ``vision_encoder``.

    ``tokenizer`` is who reads the artifact's, perhaps already.
    """

    def __init__(
        self, folder: Path, vision_encoder: VisionEncoder | None, tokenizer: TokenizerReader | None = None
    ) -> None:
        self._folder, self._vision_encoder = folder, vision_encoder
        self._tokenizer = tokenizer or TokenizerReader(folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer. Raises BadArtifact if it has none."""
        return self._tokenizer.read()

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The artifact's chat template, or None."""
        # Prompts that are no messages do without jinja2, which takes a while to import.
        from ortlm.runtime.text.chat_template import ChatTemplate

        return ChatTemplate.open(self._folder, self.tokenizer.special_tokens)

    def encode(
        self, prompt: Prompt, images: Sequence[ImageSource] | None = None, num_crops: int | None = None
    ) -> list[int]:
        """Return the token ids of ``prompt``, of any size; see LanguageModel.encode."""
        if num_crops is not None and self._vision_encoder is None:
            raise BadOption(f"num_crops does not apply: {self._folder} is a text model.")
        if self._vision_encoder is not None and (isinstance(prompt, str) or _are_messages(prompt)):
            ids = self._encode_seen(self._vision_encoder, prompt, list(images or ()), num_crops)
        elif images or (_are_messages(prompt) and any(map(_shows, cast("Sequence[Message]", prompt)))):
            if self._vision_encoder is not None:
                raise BadOption("images go with a text that has their tags, or into messages; not with ids.")
            raise BadOption(f"{self._folder} is a text model: it takes no images. Leave them out.")
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, (bytes, Mapping)) or not hasattr(prompt, "__len__"):
            raise BadOption(
                f"a prompt is a text, a list of messages or a list of token ids; found {type(prompt).__name__}."
            )
        elif len(prompt) and isinstance(prompt[0], Mapping):
            messages = cast("Sequence[Message]", prompt)
            ids = self.tokenizer.encode(self.render(messages), add_special_tokens=False)
        else:
            ids = [_token_id(token) for token in prompt]
        if not ids:
            raise BadOption("the prompt is empty: there must be at least one token to continue.")
        return ids

    def _encode_seen(
        self, encoder: VisionEncoder, prompt: Prompt, sources: list[ImageSource], num_crops: int | None
    ) -> list[int]:
        """Return the ids of a text or of messages for a model that reads images with ``encoder``."""
        images = encoder.images
        special = True
        if isinstance(prompt, str):
            text = prompt
        else:
            messages, inside = flatten(cast("Sequence[Message]", prompt), images)
            if sources and inside:
                raise BadOption("give images in the messages or next to them, not both.")
            sources = sources or inside
            text, special = self.render(messages), images.separate
        texts = split(text, images, len(sources))
        seen = [encoder.read(source, num_crops) for source in sources]
        ids: list[int] = []
        if images.separate:
            for part, views in zip(texts, [*seen, []], strict=True):
                ids += self.tokenizer.encode(part, add_special_tokens=special)
                ids += [token for image in views for token in image.ids]
            return ids
        # One token of the tokenizer's marks the place of all of an image's.
        text = texts[0] + "".join(
            placeholder(images, len(views)) + part for views, part in zip(seen, texts[1:], strict=True)
        )
        left = (image for views in seen for image in views)
        place = self.tokenizer.token_id(images.token or "")
        for token in self.tokenizer.encode(text, add_special_tokens=special):
            if token != place:
                ids.append(token)
            elif (image := next(left, None)) is not None:
                ids += image.ids
            else:
                raise BadOption(f"the prompt holds {images.token}, which stands for images; leave it out.")
        return ids

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt that the chat template makes of ``messages``."""
        if self.chat_template is None:
            raise BadOption(
                f"{self._folder} has no chat template, so messages cannot be turned into a prompt. "
                "Give the prompt as one text, or put the publisher's chat_template.jinja into the folder."
            )
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)


def _are_messages(prompt: Prompt) -> bool:
    return (
        not isinstance(prompt, (str, bytes, Mapping))
        and hasattr(prompt, "__len__")
        and len(prompt) > 0
        and isinstance(prompt[0], Mapping)
    )


def _shows(message: Message) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(image_of(part) is not None for part in content)


def _token_id(token: object) -> int:
    if isinstance(token, (int, np.integer)) and not isinstance(token, bool):
        return int(token)
    raise BadOption(
        f"a prompt is a text, a list of messages or a list of token ids; found {token!r} in a list."
    )
