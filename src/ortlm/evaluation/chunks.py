"""A text as chunks of tokens, of which the second half is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ortlm.errors import BadOption
from ortlm.evaluation.corpus import TEXTS
from ortlm.evaluation.types import Tokens
from ortlm.runtime.text.tokenizer import Tokenizer

DEFAULT_CHUNK = 512
LEAST_SCORED = 100
# Of a text to evaluate on: hours of work.
_MOST_CHARACTERS = 256 << 20
_LEAST_CHUNK = 8


@dataclass(frozen=True, slots=True)
class Text:
    """What is read: ``parts`` are pairs of a kind and a text; ``name`` says where they come from."""

    name: str
    parts: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        """Hash of all parts, one after the other."""
        return hashlib.sha256("".join(text for _, text in self.parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Chunks:
    """Equal chunks of a text, int64 [size] each. Each begins with the ``prefix`` that the tokenizer puts first.

    ``kinds`` has the index of each token's part. ``text_tokens`` are in the text, ``left_out`` of them at its end
    do not fill a chunk, or were not wanted.
    """

    tokens: tuple[Tokens, ...]
    kinds: tuple[Tokens, ...]
    size: int
    prefix: tuple[int, ...]
    text_tokens: int
    left_out: int

    @property
    def first(self) -> int:
        """The first position of a chunk whose logits are scored: those before have too little to go by."""
        return self.size // 2

    @property
    def scored(self) -> int:
        """How many tokens are scored in all: of the second half, each but the first, by the logits before it."""
        return len(self.tokens) * (self.size - 1 - self.first)


def read_text(path: str | Path | None) -> Text:
    """Return the text in the file ``path``, or the project's own corpus. Raises BadOption if it is no text."""
    if path is None:
        return Text("ortlm's own corpus", tuple(TEXTS.items()))
    try:
        with Path(path).open(encoding="utf-8") as stream:
            content = stream.read(_MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8 text: {error}"
        raise BadOption(f"--text {path} cannot be read: {reason}.") from error
    if len(content) > _MOST_CHARACTERS:
        raise BadOption(f"--text {path} has more than {_MOST_CHARACTERS:,} characters. Give a part of it.")
    return Text(Path(path).name, (("text", content),))


def chunk_size(wanted: int | None, context: int) -> int:
    """Return how many tokens a chunk has: 512 or the whole ``context`` unless something else is wanted."""
    if wanted is None:
        return min(DEFAULT_CHUNK, context)
    if not _LEAST_CHUNK <= wanted <= context:
        raise BadOption(
            f"--chunk must be {_LEAST_CHUNK} to {context}, the tokens that the context holds; got {wanted}."
        )
    return wanted


def make_chunks(text: Text, tokenizer: Tokenizer, *, size: int, tokens: int | None = None) -> Chunks:
    """Return the chunks of at most ``tokens`` tokens of ``text``.

    Raises BadOption if fewer than 100 tokens would be scored: their figures would mean nothing.
    """
    prefix = special_prefix(tokenizer)
    ids: list[int] = []
    kinds: list[int] = []
    for number, (_, part) in enumerate(text.parts):
        part_ids = tokenizer.encode(part, add_special_tokens=False)
        ids += part_ids
        kinds += [number] * len(part_ids)
    body = size - len(prefix)
    usable = min(len(ids), len(ids) if tokens is None else tokens)
    count = usable // body
    pieces = [slice(at * body, (at + 1) * body) for at in range(count)]
    chunks = Chunks(
        tokens=tuple(np.array([*prefix, *ids[piece]], np.int64) for piece in pieces),
        kinds=tuple(
            np.array([*[kinds[piece.start]] * len(prefix), *kinds[piece]], np.int64) for piece in pieces
        ),
        size=size,
        prefix=tuple(prefix),
        text_tokens=len(ids),
        left_out=len(ids) - count * body,
    )
    if chunks.scored < LEAST_SCORED:
        limit = "" if tokens is None else f", of which --tokens allows {tokens}"
        raise BadOption(
            f"{text.name} has {len(ids)} tokens{limit}; in chunks of {size} that leaves {chunks.scored} to score, "
            f"and fewer than {LEAST_SCORED} say nothing. Give a longer --text, more --tokens or a smaller --chunk."
        )
    return chunks


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that ``tokenizer`` puts before a text, such as a BOS token."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    at = _find(whole, plain)
    return whole[:at] if at > 0 else []


def _find(whole: Sequence[int], part: Sequence[int]) -> int:
    ends = range(len(whole) - len(part) + 1)
    return next((at for at in ends if whole[at : at + len(part)] == part), -1)
