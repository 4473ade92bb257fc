"""Text to token ids and back, from the files of the artifact's folder.

``tokenizer.json`` is taken as it is; ``tokenizer_config.json`` only adds what Hugging Face's classes add.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.processors import TemplateProcessing

from ortlm.artifact import read_json
from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.ids import words_only

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Enough for a decoder to see a word's beginning.
_TAIL_TOKENS = 8


class Tokenizer:
    """The tokenizer of one artifact.

    ``special_tokens`` maps names such as "bos_token" to their text, as chat templates use them.
    """

    def __init__(self, inner: Any, special_tokens: dict[str, str]) -> None:
        self._inner = inner
        self.special_tokens = special_tokens
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Open the tokenizer in ``folder``. Raises BadArtifact if there is none that can be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadArtifact(
                f"{path} is missing, so text cannot be turned into tokens. Make it with "
                '`transformers.AutoTokenizer.from_pretrained("…").save_pretrained("…")` and put it there; '
                "generation from token ids works without it."
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises Exception itself
            raise BadArtifact(f"{path} cannot be read as a tokenizer: {error}") from error
        inner.no_truncation()
        inner.no_padding()
        config = read_settings(folder / "tokenizer_config.json")
        names = {**read_settings(folder / "special_tokens_map.json"), **config}
        special = {name: text for name in _NAMED if (text := _content(names.get(name)))}
        extra = names.get("extra_special_tokens")
        if isinstance(extra, dict):
            special.update({name: text for name, value in extra.items() if (text := _content(value))})
        _add_missing(inner, config, special)
        _set_template(inner, config, special)
        return cls(inner, special)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``, with BOS and EOS if the model wants them."""
        try:
            return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            # Bytes that are not UTF-8 reach Python as lone surrogates, which the tokenizer takes for no text.
            raise BadOption("the text holds bytes that are not UTF-8; convert it first.") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``, to which tokens of pictures add nothing."""
        return str(self._inner.decode(words_only(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its text, or None."""
        found: int | None = self._inner.token_to_id(token)
        return found

    def unknown_ids(self, vocab_size: int) -> NDArray[np.int64]:
        """Return the ids below ``vocab_size`` that have no token: models round their vocabulary up."""
        known = np.zeros(vocab_size, dtype=np.bool_)
        ids = np.fromiter(self._inner.get_vocab(with_added_tokens=True).values(), dtype=np.int64)
        known[ids[ids < vocab_size]] = True
        return np.flatnonzero(~known)

    def same_as(self, other: Tokenizer) -> bool:
        """Return whether both give every token the same id."""
        return bool(
            self._inner.get_vocab(with_added_tokens=True) == other._inner.get_vocab(with_added_tokens=True)
        )

    def to_json(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json, with the tokens that only settings name."""
        return str(self._inner.to_str())

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Return a stream that decodes what follows the tokens ``prompt``."""
        return TextStream(self, prompt)


class TextStream:
    """Decodes tokens as they come: never half a character, never a lost space.

    Tokens cannot be decoded one by one, so each new text is the difference between decoding a short window
    with and without the new tokens. tokenizers' own DecodeStream does the same, but raises on byte
    sequences that random sampling produces, and keeps what is incomplete at the end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = list(prompt[-_TAIL_TOKENS:])
        # After a special token a text begins, so that its leading space is dropped as for any text.
        for at in range(len(tail) - 1, -1, -1):
            if tail[at] in tokenizer.special_ids:
                tail = tail[at + 1 :]
                break
        self._window = _whole_characters(tokenizer, tail)
        self._shown = len(self._window)
        # A character that the prompt began and the answer ends belongs to the answer.
        self._shown_text = tokenizer.decode(self._window).rstrip("\ufffd")

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is complete now, often one piece, sometimes none."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if len(text) <= len(self._shown_text) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self._shown_text) :]
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        self._shown_text = self._tokenizer.decode(self._window)
        return piece

    def flush(self) -> str:
        """Return what is left, incomplete characters as U+FFFD."""
        text = self._tokenizer.decode(self._window)
        piece = text[len(self._shown_text) :]
        self._shown, self._shown_text = len(self._window), text
        return piece


def _whole_characters(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return ``ids`` without the bytes of a character that they begin within; it has at most 4."""
    for cut in range(min(4, len(ids))):
        if not tokenizer.decode(ids[cut:]).startswith("\ufffd"):
            return ids[cut:]
    return ids


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, empty if there is no such file. Raises BadArtifact if damaged."""
    return read_json(path) if path.is_file() else {}


def _content(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _add_missing(inner: Any, config: dict[str, Any], special: dict[str, str]) -> None:
    """Add the tokens that only the configuration knows."""
    listed = config.get("added_tokens_decoder") or {}
    entries = listed.items() if isinstance(listed, dict) else ()
    known = [(int(at), e) for at, e in entries if at.isdigit() and isinstance(e, dict) and _content(e)]
    for _, entry in sorted(known, key=lambda item: item[0]):
        if inner.token_to_id(entry["content"]) is None:
            flags = {key: bool(entry.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
            token = tokenizers.AddedToken(entry["content"], special=bool(entry.get("special")), **flags)
            (inner.add_special_tokens if token.special else inner.add_tokens)([token])
    for text in special.values():
        if inner.token_to_id(text) is None:
            inner.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _set_template(inner: Any, config: dict[str, Any], special: dict[str, str]) -> None:
    """Put BOS and EOS around texts if the configuration's flags ask for it and the file adds nothing itself.

    Hugging Face's Llama classes obeyed the flags up to version 4; since then the file has the last word.
    """
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    if (bos is None and eos is None) or inner.num_special_tokens_to_add(is_pair=False) > 0:
        return
    inner.post_processor = TemplateProcessing(
        single=[*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])],
        special_tokens=[(token, inner.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token],
    )
