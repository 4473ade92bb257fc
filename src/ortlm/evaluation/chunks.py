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

    ``kinds`` has the index of each token's part. ``text_tokens`` are in the text, ``left_out`` of them do not fill
    a chunk, or were not wanted.
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
    """Return the chunks of at most ``tokens`` tokens of ``text``, from all its parts.

    Raises BadOption if fewer than 100 tokens would be scored: their figures would mean nothing.
    """
    prefix = special_prefix(tokenizer)
    ids: list[int] = []
    kinds: list[int] = []
    for number, (_, part) in enumerate(text.parts):
        part_ids = tokenizer.encode(part, add_special_tokens=False)
        ids += part_ids
        kinds += [number] * len(part_ids)
    pieces = _pieces(kinds, size - len(prefix), size - 1 - size // 2)
    if tokens is not None:
        pieces = _some(pieces, tokens // (size - len(prefix)), spread=len(text.parts) > 1)
    # Two may share tokens, of which one scores none.
    read = np.zeros(len(ids), bool)
    for piece in pieces:
        read[piece] = True
    chunks = Chunks(
        tokens=tuple(np.array([*prefix, *ids[piece]], np.int64) for piece in pieces),
        kinds=tuple(
            np.array([*[kinds[piece.start]] * len(prefix), *kinds[piece]], np.int64) for piece in pieces
        ),
        size=size,
        prefix=tuple(prefix),
        text_tokens=len(ids),
        left_out=len(ids) - int(read.sum()),
    )
    if chunks.scored < LEAST_SCORED:
        limit = "" if tokens is None else f", of which --tokens allows {tokens}"
        raise BadOption(
            f"{text.name} has {len(ids)} tokens{limit}; in chunks of {size} that leaves {chunks.scored} to score, "
            f"and fewer than {LEAST_SCORED} say nothing. Give a longer --text, more --tokens or a smaller --chunk."
        )
    return chunks


def _pieces(kinds: Sequence[int], body: int, scored: int) -> list[slice]:
    """Return where chunks of ``body`` tokens lie, of which the last ``scored`` count, each token once.

    Each part of a text begins a chunk, and another ends it if enough tokens are left to be scored; what comes
    before those is only read. So a part that is shorter than a chunk is scored too. The end of a text that is a
    single part is left out, as llama-perplexity does. A part of less than ``scored`` tokens joins the next one.
    """
    kinds_at = np.asarray(kinds)
    begins = [0, *(np.flatnonzero(np.diff(kinds_at)) + 1).tolist()]
    found: list[slice] = []
    begin = 0
    for end in [*begins[1:], len(kinds)]:
        whole = (end - begin) // body
        found += [slice(begin + i * body, begin + (i + 1) * body) for i in range(whole)]
        rest = end - begin - whole * body
        if len(begins) > 1 and rest >= scored and end >= body:
            found.append(slice(end - body, end))
        elif not whole:
            continue
        begin = end
    return found


def _some(pieces: list[slice], count: int, *, spread: bool) -> list[slice]:
    """Return ``count`` of ``pieces``: the first, or ``spread`` over all, so that every domain has its share."""
    if not spread or count >= len(pieces):
        return pieces[:count]
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, count).round().astype(int)]


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that ``tokenizer`` puts before a text, such as a BOS token."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    at = _find(whole, plain)
    return whole[:at] if at > 0 else []


def _find(whole: Sequence[int], part: Sequence[int]) -> int:
    ends = range(len(whole) - len(part) + 1)
    return next((at for at in ends if whole[at : at + len(part)] == part), -1)
