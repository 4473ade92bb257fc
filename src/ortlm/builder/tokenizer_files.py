"""The tokenizer files of a checkpoint, and what an artifact holds in their place.

Every runtime reads an artifact's tokenizer.json, and few read more. So a build settles what the class and the
settings of the checkpoint make of it, and writes that down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ortlm._utils.checked_json import shown
from ortlm.architectures._tokenizers import rebuilt_tokenizer
from ortlm.checkpoint import files
from ortlm.errors import BadCheckpoint
from ortlm.tokenization.guard import guarded
from ortlm.tokenization.reader import SETTINGS_FILES, TOKENIZER_FILE, Opened, open_text
from ortlm.tokenization.special_tokens import CONFIG_FILE, flags_of

# A class that takes tokenizer.json as it is, in every version of every runtime.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_FLAG_NAMES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A checkpoint's tokenizer, and by name the ``texts`` of files that an artifact holds instead of its own.

    ``settings`` is what tokenizer_config.json of the artifact says.
    """

    opened: Opened
    settings: Mapping[str, Any]
    texts: Mapping[str, str]

    @property
    def ids(self) -> dict[str, int]:
        """The ids of added tokens by their text."""
        added = self.opened.inner.get_added_tokens_decoder()
        return {token.content: at for at, token in added.items()}

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        added = self.opened.inner.get_added_tokens_decoder()
        return frozenset(at for at, token in added.items() if token.special)


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    """Return the tokenizer of the checkpoint in ``folder``, whose config.json is ``config``.

    Its ids are those of transformers' AutoTokenizer. Raises BadCheckpoint if there is no tokenizer.json, or one
    that cannot be read.
    """
    check_there(folder)
    path = files.shown(folder / TOKENIZER_FILE)
    with guarded(f"{path} cannot be used", BadCheckpoint):
        return _read(folder, path, config)


def _read(folder: Path, path: str, config: Mapping[str, Any]) -> TokenizerFiles:
    data = files.read_object(folder, TOKENIZER_FILE)
    if not isinstance(data.get("model"), dict):
        raise BadCheckpoint(
            f'{path} has no object "model", so it is no tokenizer. Copy the file of the base model into the '
            "folder."
        )
    read = {
        name: files.read_object(folder, name) if files.present(folder, name) else {}
        for name in SETTINGS_FILES
    }
    settings = read[CONFIG_FILE]
    raw = files.read_bytes(folder, TOKENIZER_FILE).removeprefix(b"\xef\xbb\xbf")
    rebuilt = None
    if data["model"].get("type") == "BPE":
        rebuilt = rebuilt_tokenizer(
            str(config.get("model_type")),
            settings,
            config.get("tokenizer_class"),
            byte_level=b'"ByteLevel"' in raw,
        )
    unknown = rebuilt.model["unk_token"] if rebuilt else None
    if unknown is not None and unknown not in (data["model"].get("vocab") or ()):
        rebuilt = None  # the class could read no text
    if rebuilt is None:
        opened = open_text(raw, read, where=path, error=BadCheckpoint)
    else:
        in_tokenizer = _added_tokens(data, path)
        data |= rebuilt.parts
        data["model"] |= rebuilt.model
        data["added_tokens"] = []
        opened = open_text(
            json.dumps(data, ensure_ascii=False),
            read,
            defaults=rebuilt.names,
            keeps=False,
            restates=rebuilt.restates,
            in_tokenizer=in_tokenizer,
            where=path,
            error=BadCheckpoint,
        )
    return _settled(opened, data, settings, rebuilt is not None)


def check_there(folder: Path) -> None:
    """Raise BadCheckpoint if ``folder`` has no tokenizer.json."""
    if files.present(folder, TOKENIZER_FILE):
        return
    others = [n for n in ("tokenizer.model", "vocab.json", "tekken.json") if files.present(folder, n)]
    way = (
        f"It has {others[0]}: convert it once with transformers, AutoTokenizer.from_pretrained(FOLDER)"
        ".save_pretrained(FOLDER)."
        if others
        else "Copy tokenizer.json and tokenizer_config.json of the base model into the folder."
    )
    raise BadCheckpoint(
        f"{files.shown(folder)} has no tokenizer.json, without which text cannot be read. {way}"
    )


def _settled(
    opened: Opened, data: dict[str, Any], settings: Mapping[str, Any], rebuilt: bool
) -> TokenizerFiles:
    """Return ``opened`` with the files that say the same without a class and without further settings."""
    added = opened.inner.get_added_tokens_decoder()
    tokens = [
        {"id": at, **dict(zip(_FLAG_NAMES, flags_of(token), strict=True))}
        for at, token in sorted(added.items())
    ]
    if not rebuilt:
        # What was special once is left out of texts for good, whatever it is restated as.
        listed = data.get("added_tokens") or ()
        special = {entry.get("content") for entry in listed if entry.get("special")}
        for token in tokens:
            token["special"] = token["special"] or token["content"] in special
    texts, config = {}, dict(settings)
    changed = tokens != data.get("added_tokens")
    if changed or rebuilt:
        texts[TOKENIZER_FILE] = json.dumps({**data, "added_tokens": tokens}, ensure_ascii=False) + "\n"
        config |= opened.special.names
        config["added_tokens_decoder"] = {str(t["id"]): {k: t[k] for k in _FLAG_NAMES} for t in tokens}
    # Some runtimes add what these ask for, or what a class is known for, to what the file adds.
    for key in ("add_bos_token", "add_eos_token"):
        config.pop(key, None)
    if config:
        config["tokenizer_class"] = _PLAIN_CLASS
    return TokenizerFiles(opened, config, texts)


def _added_tokens(data: Mapping[str, Any], path: str) -> dict[int, AddedToken]:
    added = {}
    for entry in data.get("added_tokens") or ():
        with guarded(f"{path}: added_tokens has {shown(entry)}, which is no token", BadCheckpoint):
            added[int(entry["id"])] = AddedToken(**{key: entry[key] for key in _FLAG_NAMES if key in entry})
    return added
