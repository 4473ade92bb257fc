"""Where images stand in prompts and messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ortlm.artifact import Images
from ortlm.errors import BadOption
from ortlm.runtime.multimodal.image_loading import (
    ImageSource,
)


def tag_pattern(images: Images) -> re.Pattern[str]:
    """Return what finds the tags of images in a text; its group is the number, if tags have numbers."""
    before, numbered, after = images.tag.partition("{}")
    return re.compile(re.escape(before) + (r"(\d+)" if numbered else "") + re.escape(after))


def split(text: str, images: Images, count: int) -> list[str]:
    """Return the texts around ``count`` images whose tags stand in ``text``, one more than there are images.

    Raises BadOption unless there are so many tags, with the numbers 1, 2, 3 … in this order.
    """
    pattern = tag_pattern(images)
    tags = list(pattern.finditer(text))
    if len(tags) != count:
        raise BadOption(
            f"the prompt has {len(tags)} image tags, but {count} images were given. Each image needs one tag, "
            f"{' '.join(images.tag.format(i) for i in (1, 2))} … in this order, or give messages without any."
        )
    if pattern.groups:
        numbers = [int(match[1]) for match in tags]
        if numbers != list(range(1, count + 1)):
            raise BadOption(
                f"the prompt's image tags have the numbers {', '.join(map(str, numbers))}; they must be 1 to "
                f"{count}, in this order: the model takes images in the order of the text."
            )
    texts, at = [], 0
    for match in tags:
        texts.append(text[at : match.start()])
        at = match.end()
    return [*texts, text[at:]]


def placeholder(images: Images, views: int) -> str:
    """Return the text of an image with ``views``, itself and its crops; each is ``images.token`` in it."""
    one = f"{images.before}{images.token}{images.after}"
    scan = images.pan_and_scan
    if views == 1 or scan is None:
        return one
    return f"{scan.before}{one}{scan.between}{scan.separator.join([one] * (views - 1))}"


_KINDS = ("image", "image_url", "input_image")


def image_of(part: Any) -> ImageSource | None:
    """Return the image in a part of a message's content, None if it is something else.

    Parts are {"type": "image", "image": …} or, as in OpenAI's API, {"type": "image_url", "image_url": {"url": …}}.
    Raises BadOption for one without an image.
    """
    if not isinstance(part, dict) or part.get("type") not in _KINDS:
        return None
    for key in ("image", "image_url", "url", "path"):
        named = part.get(key)
        if isinstance(named, dict):
            named = named.get("url")
        if named is not None:
            source: ImageSource = named
            return source
    raise BadOption(
        'a content part of type "image" needs the image: {"type": "image", "image": PATH, URL, bytes, Pillow '
        "image or numpy array}."
    )


def flatten(messages: Sequence[Any], images: Images) -> tuple[list[Any], list[ImageSource]]:
    """Return ``messages`` with their images taken out, and those, in order.

    Where tags have numbers, a tag and a line break take an image's place, and contents become texts; else the
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
            source = image_of(part)
            if source is None:
                parts.append(part)
                continue
            sources.append(source)
            tag = f"{images.tag.format(len(sources))}{images.tag_end}"
            parts.append({"type": "text", "text": tag} if numbered else {"type": "image"})
        out.append({**message, "content": parts})
    return out, sources
