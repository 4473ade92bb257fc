"""From the metadata of a GGUF file to the tokenizer files that a Hugging Face checkpoint would have.

Two kinds are made: byte-level BPE, whose file names the way that texts are split before, and SentencePiece's BPE,
whose scores say in which order pieces merge. Every other kind is refused by its name, and so is a way to split
that is not known: a tokenizer that comes close gives a model ids that it has not learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._pre_tokenizers import PRE_TOKENIZERS
from ortlm.architectures._tokenizers import FINISHED, bpe_settings
from ortlm.checkpoint.gguf_header import Numbers
from ortlm.errors import BadCheckpoint, UnsupportedModel, nearest

_BEFORE = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_TYPES = (_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE)
_BLANK = "\u2581"
_MOST_PIECE = 1 << 12
# What transformers calls the tokens that the file gives by id.
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
# What SentencePiece has where a file does not say.
_USUAL = {"bos": 1, "eos": 2, "unknown": 0}
# Of other kinds of tokenizers, or of what is written around texts that are filled in.
_KNOWN = {
    "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "add_bos_token",
    "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces", "eot_token_id",
    "eom_token_id", "seperator_token_id", "mask_token_id", "cls_token_id", "fim_pre_token_id",
    "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id",
    "prefix_token_id", "suffix_token_id",
    "middle_token_id", *(f"{name}_token_id" for name in _NAMED),
}  # fmt: skip
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a file by id, with their types and the ids of those that have a role."""

    texts: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]

    def added(self, form: Gguf) -> list[dict[str, Any]]:
        """Return the tokens that texts are searched for before all else, as tokenizer.json has them."""
        roles = set(self.ids.values())
        return [
            {
                "id": at,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": form.strips_right and text not in form.keeps_right,
                "normalized": False,
                "special": kind != _USER or at in roles,
            }
            for at, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if kind in (_CONTROL, _USER, _UNKNOWN) or at in roles
        ]


class _Metadata:
    """Values below ``tokenizer.ggml.``, checked for their types; ``where`` is the file."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._values, self.where = metadata, where

    def get(self, key: str, kind: Any, expected: str) -> Any:
        value = self._values.get(_BEFORE + key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(key, expected)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, bool, "true or false")
        return default if value is None else bool(value)

    def strings(self, key: str) -> list[str]:
        found = self.get(key, list, "a list of strings")
        if found is None or not found:
            raise BadCheckpoint(
                f'{self.where} has no "{_BEFORE}{key}", without which text cannot be read. Use a file that has '
                "the whole tokenizer, or convert the model again."
            )
        return list(found)

    def numbers(self, key: str, count: int) -> Any:
        found = self.get(key, Numbers, "a list of numbers")
        if found is None:
            return None
        if len(found) != count or found.values.dtype.kind not in "iuf":
            raise self.wrong(key, f"a list of {count:,} numbers, one for each token")
        return found.values

    def wrong(self, key: str, expected: str) -> BadCheckpoint:
        value = self._values.get(_BEFORE + key)
        found = f"a list of {len(value)}" if isinstance(value, list | Numbers) else shown(value)
        return BadCheckpoint(
            f'{self.where}: "{_BEFORE}{key}" is {found}, expected {expected}. The file is damaged; '
            "download it again."
        )

    def check_known(self) -> None:
        for key in self._values:
            if key.startswith(_BEFORE) and key.removeprefix(_BEFORE) not in _KNOWN:
                raise UnsupportedModel(
                    f"{self.where}: {shown(key)} may change how texts become tokens, and is not known to this "
                    "version of ortlm."
                )


def tokenizer_files(
    metadata: Mapping[str, Any], form: Gguf, vocab: int, where: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the texts of the tokenizer's files by name, and the keys of config.json that name tokens.

    ``vocab`` is how many tokens the model has, ``where`` the file for errors. Raises BadCheckpoint if the
    tokenizer is missing or contradicts itself, UnsupportedModel if it is of a kind that is not known.
    """
    known = _Metadata(metadata, where)
    kind = known.get("model", str, "the name of a tokenizer")
    if kind is None:
        raise BadCheckpoint(
            f'{where} has no "{_BEFORE}model", so no tokenizer, without which text cannot be read. Use a file '
            "that has one, or convert the model again."
        )
    make = _KINDS.get(kind)
    if make is None:
        raise UnsupportedModel(
            f'{where}: "{_BEFORE}model" is {shown(kind)}, a kind of tokenizer that is not supported. Known: '
            f"{', '.join(_KINDS)}."
        )
    known.check_known()
    tokens = _tokens(known, vocab, usual=_USUAL if kind == "llama" else {})
    data, begins = make(known, tokens)
    data |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens.added(form),
        "post_processor": _around(known, tokens, begins),
    }
    settings: dict[str, Any] = {
        name: tokens.texts[tokens.ids[role]] for role, name in _NAMED.items() if role in tokens.ids
    }
    settings |= {"tokenizer_class": FINISHED, "clean_up_tokenization_spaces": False}
    template = _templates(metadata, where)
    if template:
        settings["chat_template"] = template
    ids = _ids(tokens)
    generation = {**ids, **_sampling(metadata)}
    if "eos_token_id" in ids:
        others = (tokens.ids.get(role) for role in ("eos", "eot", "eom"))
        generation["eos_token_id"] = list(dict.fromkeys(at for at in others if at is not None))
    texts = {
        "tokenizer.json": data,
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }
    return {name: json.dumps(value, ensure_ascii=False) + "\n" for name, value in texts.items()}, ids


def _tokens(known: _Metadata, vocab: int, usual: Mapping[str, int]) -> _Tokens:
    texts = known.strings("tokens")
    if len(texts) != vocab:
        raise BadCheckpoint(
            f'{known.where}: "{_BEFORE}tokens" has {len(texts):,} tokens, and the embeddings are of {vocab:,}. '
            "The file is damaged; download it again."
        )
    # As llama.cpp calls them.
    texts = [text or f"[EMPTY_{at}]" for at, text in enumerate(texts)]
    if len(set(texts)) != len(texts):
        seen: set[str] = set()
        twice = next(t for t in texts if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise BadCheckpoint(
            f'{known.where}: "{_BEFORE}tokens" has {shown(twice)} twice, and nobody knows which one a text '
            "means. The file is damaged; convert the model again."
        )
    found = known.numbers("token_type", vocab)
    types = [int(t) for t in found] if found is not None else [_NORMAL] * vocab
    if any(t not in _TYPES for t in set(types)):
        raise known.wrong("token_type", f"numbers from {_TYPES[0]} to {_TYPES[-1]}")
    ids = {}
    for role in (*_NAMED, "eot", "eom"):
        at = known.get(f"{role}_token_id", int, "a token's id")
        at = usual.get(role) if at is None else at
        # Without a token of their own, models for which it is all the same say so with a number beyond the last.
        if at is not None and 0 <= at < vocab:
            ids[role] = at
        elif at is not None and role in ("bos", "eos"):
            raise known.wrong(f"{role}_token_id", f"a number from 0 to {vocab - 1}")
    return _Tokens(texts, types, ids)


def _ids(tokens: _Tokens) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {name: tokens.ids[role] for role, name in names.items() if role in tokens.ids}


# --- byte-level BPE -----------------------------------------------------------------------------------------


def _byte_level(known: _Metadata, tokens: _Tokens) -> tuple[dict[str, Any], bool]:
    name = known.get("pre", str, "the name of a way to split texts")
    if name is None or name not in PRE_TOKENIZERS:
        told = "is missing" if name is None else f"is {shown(name)}, which is not known"
        raise UnsupportedModel(
            f'{known.where}: "{_BEFORE}pre" {told}, so that how texts are split before they become tokens can '
            f"only be guessed.{nearest(name or '', PRE_TOKENIZERS)} Known: {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Build from the Hugging Face checkpoint instead."
        )
    if known.flag("add_space_prefix", False):
        raise UnsupportedModel(
            f'{known.where}: "{_BEFORE}add_space_prefix" is true, which is not known for byte-level BPE.'
        )
    way = PRE_TOKENIZERS[name]
    ids = {text: at for at, text in enumerate(tokens.texts)}
    merges = []
    for at, line in enumerate(known.strings("merges")):
        # A piece may begin with a blank, and has none elsewhere.
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise BadCheckpoint(
                f'{known.where}: entry {at} of "{_BEFORE}merges" is {shown(line)}, expected two tokens that make '
                "a third. The file is damaged; download it again."
            )
        merges.append([left, right])
    model = {
        "type": "BPE",
        **bpe_settings(ignore_merges=way.ignores_merges),
        "vocab": ids,
        "merges": merges,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {**way.parts(), "decoder": decoder, "model": model}, way.begins


# --- SentencePiece ------------------------------------------------------------------------------------------


def _sentence_piece(known: _Metadata, tokens: _Tokens) -> tuple[dict[str, Any], bool]:
    scores = known.numbers("scores", len(tokens.texts))
    if scores is None:
        raise BadCheckpoint(
            f'{known.where} has no "{_BEFORE}scores", without which the order in which pieces merge is unknown. '
            "Use a file that has the whole tokenizer, or convert the model again."
        )
    prefix = known.flag("add_space_prefix", True)
    ids = {text: at for at, text in enumerate(tokens.texts)}
    bytes_there = all(f"<0x{value:02X}>" in ids for value in range(256))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "type": "BPE",
        **bpe_settings(
            unk_token=tokens.texts[tokens.ids["unknown"]] if "unknown" in tokens.ids else None,
            fuse_unk=True,
            byte_fallback=bytes_there,
        ),
        "vocab": ids,
        "merges": _merges(tokens, ids, scores),
    }
    begin = [{"type": "Prepend", "prepend": _BLANK}] if prefix else []
    data = {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return data, True


def _merges(tokens: _Tokens, ids: Mapping[str, int], scores: Any) -> list[list[str]]:
    """Return the pairs of pieces that make a third, the piece of the highest score first."""
    plain = {
        text for text, kind in zip(tokens.texts, tokens.types, strict=True) if kind in (_NORMAL, _UNUSED)
    }
    found: list[tuple[float, int, int, int]] = []
    for text in plain:
        if not 2 <= len(text) <= _MOST_PIECE:
            continue
        at = ids[text]
        score = -float(scores[at])
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in plain and right in plain:
                found.append((score, at, ids[left], ids[right]))
    found.sort()
    return [[tokens.texts[left], tokens.texts[right]] for _, _, left, right in found]


_KINDS = {"gpt2": _byte_level, "llama": _sentence_piece}


# --- around texts -------------------------------------------------------------------------------------------


def _around(known: _Metadata, tokens: _Tokens, begins: bool) -> dict[str, Any] | None:
    """Return what puts the tokens around a text that the file asks for."""
    before = _role(known, tokens, "bos", known.flag("add_bos_token", begins))
    after = _role(known, tokens, "eos", known.flag("add_eos_token", False))
    if before is None and after is None:
        return None
    special = {
        text: {"id": text, "ids": [at], "tokens": [text]} for text, at in (x for x in (before, after) if x)
    }

    def template(name: str, kind: int) -> list[dict[str, Any]]:
        return [
            *([{"SpecialToken": {"id": before[0], "type_id": kind}}] if before else []),
            {"Sequence": {"id": name, "type_id": kind}},
            *([{"SpecialToken": {"id": after[0], "type_id": kind}}] if after else []),
        ]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": special,
    }


def _role(known: _Metadata, tokens: _Tokens, role: str, wanted: bool) -> tuple[str, int] | None:
    if not wanted:
        return None
    if role not in tokens.ids:
        raise BadCheckpoint(
            f"{known.where} asks for a token at the {'beginning' if role == 'bos' else 'end'} of texts, and has "
            f'no "{_BEFORE}{role}_token_id". The file is damaged; convert the model again.'
        )
    return tokens.texts[tokens.ids[role]], tokens.ids[role]


def _templates(metadata: Mapping[str, Any], where: str) -> str | list[dict[str, str]] | None:
    """Return the chat template, or all that there are under names."""
    default = metadata.get("tokenizer.chat_template")
    before = "tokenizer.chat_template."
    named = {key.removeprefix(before): value for key, value in metadata.items() if key.startswith(before)}
    for key, value in {"tokenizer.chat_template": default, **named}.items():
        if value is not None and not isinstance(value, str):
            raise BadCheckpoint(
                f"{where}: the chat template {shown(key)} is {shown(value)}, expected a text."
            )
    if not named:
        return default
    all_of_them = {**({"default": default} if default is not None else {}), **named}
    return [{"name": name, "template": text} for name, text in all_of_them.items()]


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the publisher advises to sample with, as generation_config.json says it."""
    before = "general.sampling."
    found = {
        _SAMPLING.get(key.removeprefix(before), key.removeprefix(before)): value
        for key, value in metadata.items()
        if key.startswith(before) and isinstance(value, (int, float, str))
    }
    return {"do_sample": True, **found} if "temperature" in found else found
