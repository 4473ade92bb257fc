"""Images and sound: read and kept, for models that take them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from ortlm.genai.errors import GenaiError

_M = TypeVar("_M", bound="_Media")


class _Media:
    """The contents of files, in order."""

    kind = "file"

    def __init__(self, contents: list[bytes]) -> None:
        if not contents:
            raise GenaiError(f"give at least one {self.kind}.")
        self.contents = contents

    @classmethod
    def open(cls: type[_M], *paths: str | Path) -> _M:
        """Read files. Raises GenaiError if one is missing."""
        for path in paths:
            if not isinstance(path, (str, Path)):
                raise GenaiError(f"an {cls.kind} is opened by its path, found {type(path).__name__}.")
            if not Path(path).is_file():
                raise GenaiError(f"there is no {cls.kind} {path}.")
        return cls([Path(path).read_bytes() for path in paths])

    @classmethod
    def open_bytes(cls: type[_M], *contents: bytes) -> _M:
        """Take the contents of files."""
        return cls([bytes(content) for content in contents])


class Images(_Media):
    """Images for a MultiModalProcessor."""

    kind = "image"


class Audios(_Media):
    """Sound for a MultiModalProcessor."""

    kind = "audio file"
