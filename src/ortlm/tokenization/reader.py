"""Opens tokenizer.json as the settings next to it mean it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ortlm.errors import Error
from ortlm.tokenization.growth import MOST_TOKEN_CHARACTERS, check_growth
from ortlm.tokenization.guard import guarded
from ortlm.tokenization.special_tokens import (
    ADDED_FILE,
    CONFIG_FILE,
    MAP_FILE,
    SpecialTokens,
    flags_of,
    read_special_tokens,
)

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILES = (CONFIG_FILE, MAP_FILE, ADDED_FILE)
MOST_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Opened:
    """A tokenizer of the library, and its special tokens by name.

    ``cleans``: spaces before punctuation are taken away from decoded text.
    """

    inner: Any
    special: SpecialTokens
    cleans: bool


def open_text(
    text: str | bytes,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    defaults: Mapping[str, str] | None = None,
    keeps: bool = True,
    restates: bool = False,
    in_tokenizer: Mapping[int, AddedToken] | None = None,
    where: str,
    error: type[Error],
) -> Opened:
    """Open the tokenizer.json ``text`` with ``settings``, objects by the name of their file.

    ``defaults``, ``keeps`` and ``in_tokenizer`` are for tokenizers that are built again (see
    ``read_special_tokens``); with ``restates`` special tokens then match exactly. ``where`` is the file's name in
    messages. Raises ``error`` for everything that is no tokenizer, or one that would exhaust memory.
    """
    with guarded(f"{where} cannot be read as a tokenizer", error):
        inner = tokenizers.Tokenizer.from_buffer(text.encode() if isinstance(text, str) else text)
        inner.no_truncation()
        inner.no_padding()
    with guarded(f"{where} cannot be used", error):
        check_growth(inner, where, error)
        there = inner.get_added_tokens_decoder()
        special = read_special_tokens(
            settings,
            there if in_tokenizer is None else in_tokenizer,
            defaults=defaults,
            keeps=keeps,
            error=error,
        )
        known = {flags_of(token) for token in there.values()}
        missing = [token for token in special.added if flags_of(token) not in known]
        for token in missing:
            if len(token.content) > MOST_TOKEN_CHARACTERS:
                raise error(
                    f"{where}: a token has {len(token.content)} characters, at most {MOST_TOKEN_CHARACTERS} are "
                    "allowed."
                )
        inner.add_tokens(missing)
        if restates:
            texts = dict.fromkeys((*special.names.values(), *special.extra))
            inner.add_tokens([AddedToken(text, special=True) for text in texts])
        config = settings.get(CONFIG_FILE) or {}
        inner.encode_special_tokens = _flag(config, "split_special_tokens", error)
        forced = _flag(
            config, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", error
        )
        cleans = _flag(config, "clean_up_tokenization_spaces", error)
        cleans = cleans and (forced or type(inner.model).__name__ != "BPE")
    return Opened(inner, special, cleans)


def clean_up(text: str) -> str:
    """Return ``text`` without the spaces that word pieces leave before punctuation."""
    for found, put in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
        (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        text = text.replace(found, put)
    return text


def _flag(config: Mapping[str, Any], key: str, error: type[Error]) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise error(f"{CONFIG_FILE}: {key} is {value!r}, expected true or false.")
    return bool(value)
