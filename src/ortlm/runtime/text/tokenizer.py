"""Text to token ids and back, from the files of the artifact's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm._utils.checked_json import read_bytes
from ortlm.artifact import read_json
from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.engine.token_ids import text_tokens_only
from ortlm.tokenization.growth import MOST_TOKEN_CHARACTERS
from ortlm.tokenization.guard import as_error
from ortlm.tokenization.reader import MOST_BYTES, SETTINGS_FILES, TOKENIZER_FILE, Opened, clean_up, open_text

# Enough for a decoder to see a word's beginning.
_TAIL_TOKENS = 8
# A text of more characters is a mistake, such as a file that is no text.
MOST_CHARACTERS = 1 << 26
# No honest tokenizer makes more tokens of a text: a character has 4 bytes, a ligature becomes 18 characters.
_MOST_TOKENS_PER_CHARACTER = 128
_MOST_TOKENS_AROUND = 2048
# When a text has ended with half a character for so many tokens, a clean place is looked for, and then given up.
_LONG_TOKENS, _LONGEST_TOKENS = 16, 64
_BROKEN = "\ufffd"


class Tokenizer:
    """The tokenizer of one artifact.

    ``special_tokens`` maps names such as "bos_token" to their text, as chat templates use them.
    """

    def __init__(self, opened: Opened) -> None:
        self._inner = opened.inner
        self._cleans = opened.cleans
        self.special_tokens = dict(opened.special.names)
        added = self._inner.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self.bytes_by_id = _bytes_by_id(self._inner)
        self._is_byte_level = "ByteLevel" in _decoders(self._inner)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Open the tokenizer in ``folder``.

        Raises BadArtifact if there is none that can be read, or one that would exhaust memory.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise BadArtifact(
                f"{path} is missing, so text cannot be turned into tokens. Make it with "
                '`transformers.AutoTokenizer.from_pretrained("…").save_pretrained("…")` and put it there; '
                "generation from token ids works without it."
            )
        text = read_bytes(path, limit=MOST_BYTES, error=BadArtifact)
        settings = {name: read_settings(folder / name) for name in SETTINGS_FILES}
        return cls(open_text(text, settings, where=str(path), error=BadArtifact))

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``, with BOS and EOS if tokenizer.json puts them around texts.

        Raises BadOption for what is no text in Unicode or too long, BadArtifact if the tokenizer fails.
        """
        if len(text) > MOST_CHARACTERS:
            raise BadOption(
                f"the text has {len(text):,} characters, more than the {MOST_CHARACTERS:,} that are read at once. "
                "Give it in parts."
            )
        try:
            ids = list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            # Bytes that are not UTF-8 reach Python as lone surrogates, which the tokenizer takes for no text.
            raise BadOption("the text holds bytes that are not UTF-8; convert it first.") from error
        except BaseException as error:
            raise as_error(error, "the tokenizer cannot read the text", BadArtifact) from error
        if len(ids) > _MOST_TOKENS_PER_CHARACTER * len(text) + _MOST_TOKENS_AROUND:
            raise BadArtifact(
                f"the tokenizer makes {len(ids)} tokens of {len(text)} characters: it is damaged."
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``, to which tokens of images add nothing."""
        text = self.decode_raw(ids, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self._cleans else text

    def decode_raw(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids`` as it is before spaces are cleaned up."""
        try:
            return str(self._inner.decode(text_tokens_only(ids), skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            raise as_error(error, "the tokenizer cannot write the tokens", BadArtifact) from error

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its text, or None."""
        try:
            number: int | None = self._inner.token_to_id(token)
        except UnicodeEncodeError:
            return None
        return number

    def token_bytes(self, token: int) -> bytes | None:
        """Return the bytes that ``token`` stands for, None if its text says it all.

        Tokens of byte-level vocabularies and single bytes of others may be parts of a character.
        """
        byte = self.bytes_by_id.get(token)
        if byte is not None:
            return bytes([byte])
        if not self._is_byte_level or token in self._added_ids:
            return None
        piece = self._inner.id_to_token(token)
        try:
            return None if piece is None else bytes(_BYTES_BY_LETTER[letter] for letter in piece)
        except KeyError:
            return None

    def unknown_ids(self, vocab_size: int) -> NDArray[np.int64]:
        """Return the ids below ``vocab_size`` that have no token: models round their vocabulary up."""
        known = np.zeros(vocab_size, dtype=np.bool_)
        known[self.ids[self.ids < vocab_size]] = True
        return np.flatnonzero(~known)

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """The ids of all tokens, int64, in any order. Takes a while for a large vocabulary.

        Raises BadArtifact for a token that no tokenizer has.
        """
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        if max(map(len, vocabulary), default=0) > MOST_TOKEN_CHARACTERS:
            raise BadArtifact(
                f"a token of the tokenizer has more than {MOST_TOKEN_CHARACTERS} characters: it is damaged."
            )
        return np.fromiter(vocabulary.values(), dtype=np.int64, count=len(vocabulary))

    def same_as(self, other: Tokenizer) -> bool:
        """Return whether both give every token the same id."""
        return bool(
            self._inner.get_vocab(with_added_tokens=True) == other._inner.get_vocab(with_added_tokens=True)
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of which id each token has: one for all tokenizers of which ``same_as`` is true."""
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json, with the tokens that only settings name."""
        return str(self._inner.to_str())

    def stream(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> TextStream:
        """Return a stream that decodes what follows the tokens ``prompt``."""
        return TextStream(self, prompt, skip_special_tokens=skip_special_tokens, cleans=self._cleans)


class TextStream:
    """Decodes tokens as they come: never half a character, never a lost space.

    Tokens cannot be decoded one by one, so each new text is the difference between decoding a short window
    with and without the new tokens. tokenizers' own DecodeStream does the same, but raises on byte
    sequences that random sampling produces, and keeps what is incomplete at the end.

    Tokens that stand for single bytes are text together or not at all: decoders write U+FFFD for every byte of a
    run that is not UTF-8. What was shown of a run before it broke stays; each byte after it is one U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        cleans: bool = False,
    ) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._cleaner = _Cleaner() if cleans else None
        tail = list(prompt[-_TAIL_TOKENS:])
        # After a special token a text begins, so that its leading space is dropped as for any text.
        for at in range(len(tail) - 1, -1, -1):
            if tail[at] in tokenizer.special_ids:
                tail = tail[at + 1 :]
                break
        self._window = self._whole_characters(tail)
        self._shown = len(self._window)
        # A character that the prompt began and the answer ends belongs to the answer.
        self._shown_text = self._decode(self._window).rstrip(_BROKEN)
        self._half = self._half_character()
        self._broken = False

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is complete now, often one piece, sometimes none."""
        piece = self._push(token_id)
        return self._cleaner.push(piece) if self._cleaner else piece

    def flush(self) -> str:
        """Return what is left, incomplete characters as U+FFFD."""
        if self._half:
            piece = self._end_run()
        else:
            text = self._decode(self._window)
            piece = text[len(self._shown_text) :]
            self._shown, self._shown_text = len(self._window), text
        return self._cleaner.push(piece) + self._cleaner.flush() if self._cleaner else piece

    def _push(self, token_id: int) -> str:
        byte = self._tokenizer.bytes_by_id.get(token_id)
        if byte is not None:
            return self._push_byte(token_id, byte)
        ended = ""
        if (self._half or self._broken) and self._decode([token_id]):
            ended = self._end_run()
        self._window.append(token_id)
        return ended + self._complete()

    def _push_byte(self, token_id: int, byte: int) -> str:
        self._window.append(token_id)
        if self._broken:
            self._restart()
            return _BROKEN
        self._half += bytes([byte])
        try:
            self._half.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            count, self._half, self._broken = len(self._half), b"", True
            self._restart()
            return _BROKEN * count
        self._half = b""
        return self._complete()

    def _complete(self) -> str:
        """Return what the window says beyond what was shown, unless it ends within a character."""
        text = self._decode(self._window)
        if len(text) <= len(self._shown_text):
            return ""
        if text.endswith(_BROKEN) and not self._half:
            return self._cut(text)
        if self._half:
            return ""
        piece = text[len(self._shown_text) :]
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        self._shown_text = self._decode(self._window)
        return piece

    def _cut(self, text: str) -> str:
        """Return the part of ``text``, which has long ended with half a character, that nothing can change.

        Without it the window would grow for as long as a model writes broken bytes, and time with its square.
        """
        waiting = len(self._window) - self._shown
        if waiting < _LONG_TOKENS:
            return ""
        for at in range(len(self._window) - 1, len(self._window) - 4, -1):
            before, after = self._decode(self._window[:at]), self._decode(self._window[at:])
            # What does not change a text's end now begins again, so what follows it does not either.
            if after and before + after == text:
                piece = before[len(self._shown_text) :]
                self._window, self._shown, self._shown_text = self._window[at:], 0, ""
                return piece
        if waiting < _LONGEST_TOKENS:
            return ""
        piece = text[len(self._shown_text) :]
        self._restart()
        return piece

    def _end_run(self) -> str:
        """Return the bytes that wait for others in vain, each as U+FFFD."""
        piece, self._half, self._broken = _BROKEN * len(self._half), b"", False
        self._restart()
        return piece

    def _restart(self) -> None:
        """Take everything for shown; the last text stays, so that what follows is no text's beginning."""
        last = len(self._window) - 1
        while last > 0 and not self._decode(self._window[last:]):
            last -= 1
        self._window = self._window[max(0, last) :]
        self._shown, self._shown_text = len(self._window), self._decode(self._window)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode_raw(ids, skip_special_tokens=self._skips)

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """Return ``ids`` without the bytes of a character that they begin within; it has at most 4."""
        for cut in range(min(4, len(ids))):
            if not self._decode(ids[cut:]).startswith(_BROKEN):
                return ids[cut:]
        return ids

    def _half_character(self) -> bytes:
        """Return the bytes at the window's end that begin a character."""
        run: list[int] = []
        for token in reversed(self._window):
            byte = self._tokenizer.bytes_by_id.get(token)
            if byte is None:
                break
            run.append(byte)
        end = bytes(reversed(run))
        for count in range(1, min(3, len(end)) + 1):
            try:
                end[-count:].decode("utf-8")
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and error.start == 0:
                    return end[-count:]
        return b""


class _Cleaner:
    """Cleans up spaces of a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece and return what no later one can change: all before a space that may go."""
        text = self._held + piece
        cut = text.rfind(" ")
        while cut > 0 and text.endswith(" '", 0, cut):
            cut = text.rfind(" ", 0, cut)
        # The longest text that is cleaned has 4 characters.
        cut = len(text) if cut < 0 or cut < len(text) - 4 else cut
        self._held = text[cut:]
        return clean_up(text[:cut])

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return clean_up(held)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, empty if there is no such file. Raises BadArtifact if damaged."""
    return read_json(path) if path.is_file() else {}


def _bytes_by_id(inner: Any) -> Mapping[int, int]:
    """Return the bytes that single tokens stand for by their ids, if the decoder joins them to characters."""
    if "ByteFallback" not in _decoders(inner):
        return {}
    ids = ((inner.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {id_: byte for id_, byte in ids if id_ is not None}


def _decoders(inner: Any) -> str:
    """Return the kinds of the steps that make text of tokens."""
    if inner.decoder is None:
        return ""
    return json.dumps(_kinds(json.loads(inner.decoder.__getstate__())))


def _letters() -> dict[str, int]:
    """Return the bytes by the letters that byte-level vocabularies write for them, as GPT-2 does."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES_BY_LETTER = _letters()


def _kinds(part: dict[str, Any]) -> list[Any]:
    return [part.get("type"), *map(_kinds, part.get("decoders") or ())]
