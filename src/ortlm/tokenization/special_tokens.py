"""Which tokens are special, and how they match, from the files next to tokenizer.json.

tokenizer.json lists added tokens with their flags; tokenizer_config.json, or in older folders
special_tokens_map.json and added_tokens.json, may restate them with others and name more. Source of the rules:
transformers 5.24's
``PreTrainedTokenizerBase._from_pretrained`` and ``TokenizersBackend.__init__``, whose ids are the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from ortlm.errors import Error

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_ADDED_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What the settings say.

    ``names`` are the special tokens by name ("bos_token"), as chat templates use them; ``extra`` are special
    tokens without a name; ``added`` are tokens to be added in this order, each with its flags.
    """

    names: dict[str, str]
    extra: tuple[str, ...]
    added: list[AddedToken]


def read_special_tokens(
    files: Mapping[str, Mapping[str, Any]],
    in_tokenizer: Mapping[int, AddedToken],
    *,
    defaults: Mapping[str, str] | None = None,
    keeps: bool = True,
    error: type[Error],
) -> SpecialTokens:
    """Return the special tokens that ``files``, objects by file name, name besides those ``in_tokenizer``.json.

    ``defaults`` are names that a tokenizer class gives where the settings are silent. Unless ``keeps``, the tokens
    of tokenizer.json are not there yet and have to be added too. Raises ``error`` for settings of a wrong type.
    """
    config = dict(files.get(CONFIG_FILE) or {})
    decoder: dict[int, AddedToken] = {}
    found = _ReadTokens(CONFIG_FILE, error)
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    if config.get("added_tokens_decoder") is not None:
        decoder = found.by_id(config["added_tokens_decoder"])
    else:
        config |= _ReadTokens(MAP_FILE, error).special(files.get(MAP_FILE) or {})
        special = _texts(config, found)
        for text, at in (files.get(ADDED_FILE) or {}).items():
            if not isinstance(at, int) or isinstance(at, bool) or at < 0:
                raise error(f"{ADDED_FILE}: {text!r} has {at!r}, expected the token's id.")
            decoder[at] = AddedToken(text, normalized=text not in special, special=text in special)
        decoder |= in_tokenizer
    by_text = {token.content: token for token in decoder.values()}
    config = {**(defaults or {}), **config}
    names = {
        key: by_text.get(token.content, token)
        for key in NAMED
        if (token := found.token(key, config.get(key)))
    }
    # Names of a model's own, such as image_token.
    for key, value in config.items():
        if key not in NAMED and key.endswith("_token") and isinstance(value, str | dict | AddedToken):
            names.update({key: token} if (token := found.token(key, value)) else {})
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens"))
    unnamed: list[AddedToken] = []
    if isinstance(extra, dict):
        names |= {key: token for key, value in extra.items() if (token := found.token(key, value))}
    elif isinstance(extra, list):
        unnamed = [token for value in extra if (token := found.token("extra_special_tokens", value))]
    elif extra is not None:
        raise error(f"{CONFIG_FILE}: extra_special_tokens is {extra!r}, expected a list of tokens.")
    added = [decoder[at] for at in sorted(decoder)]
    there = set(by_text) | ({token.content for token in in_tokenizer.values()} if keeps else set())
    for token in (*names.values(), *unnamed):
        if token.content not in there:
            there.add(token.content)
            added.append(token)
    named = {token.content for token in names.values()}
    return SpecialTokens(
        names={key: token.content for key, token in names.items()},
        extra=tuple(token.content for token in unnamed),
        added=[_made_special(token) if token.content in named else token for token in added],
    )


def flags_of(token: AddedToken) -> tuple[Any, ...]:
    """Return everything that tells two tokens apart: equality of the library looks at the text alone."""
    return (token.content, *(getattr(token, flag) for flag in _FLAGS))


@dataclass(frozen=True, slots=True)
class _ReadTokens:
    """Reads tokens as publishers write them in ``file``; ``error`` is raised for anything else."""

    file: str
    error: type[Error]

    def token(self, key: str, value: Any) -> AddedToken | None:
        """Return a special token from its text or from an object with its flags, None from null."""
        if isinstance(value, AddedToken):
            return value
        if isinstance(value, str):
            value = {"content": value}
        # As null: what is no token names none.
        if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
            return None
        return self._token(key, value, special=True)

    def by_id(self, listed: Any) -> dict[int, AddedToken]:
        """Return the tokens of ``added_tokens_decoder``."""
        if not isinstance(listed, dict) or len(listed) > _MOST_ADDED_TOKENS:
            raise self.error(f"{self.file}: added_tokens_decoder must be an object of tokens by id.")
        found = {}
        for at, value in listed.items():
            if not re.fullmatch("[0-9]{1,10}", at):
                raise self.error(
                    f"{self.file}: added_tokens_decoder has the key {at!r}, expected a token's id."
                )
            if not isinstance(value, dict):
                raise self.error(f"{self.file}: added_tokens_decoder[{at}] is {value!r}, expected an object.")
            found[int(at)] = self._token(f"added_tokens_decoder[{at}]", value)
        return found

    def special(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``settings`` with special tokens in place of objects that describe them."""
        return {
            key: self._token(key, {**value, "special": True})
            if isinstance(value, dict) and key != "extra_special_tokens"
            else value
            for key, value in settings.items()
        }

    def _token(self, key: str, value: Any, special: bool | None = None) -> AddedToken:
        text = value.get("content") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise self.error(f"{self.file}: {key} is {value!r}, expected the text of a token.")
        flags = {flag: value[flag] for flag in _FLAGS if value.get(flag) is not None}
        for flag, given in flags.items():
            if not isinstance(given, bool):
                raise self.error(f"{self.file}: {flag} of {key} is {given!r}, expected true or false.")
        if special is not None:
            flags.setdefault("special", special)
        return AddedToken(text, **flags)


def _texts(config: Mapping[str, Any], read: _ReadTokens) -> set[str]:
    """Return the texts of the tokens that ``config`` names."""
    extra = config.get("extra_special_tokens") or ()
    values: Iterable[Any] = [config.get(key) for key in NAMED]
    values = [*values, *(extra if isinstance(extra, list) else ())]
    return {token.content for value in values if (token := read.token("a special token", value))}


def _made_special(token: AddedToken) -> AddedToken:
    if not token.special:
        token.special = True
    return token
