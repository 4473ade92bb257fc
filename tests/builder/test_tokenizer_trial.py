"""Tokenizers that fail, panic, multiply texts or never end are refused before anything is built, and at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from packaging.version import Version

from ortlm.builder import tokenizer_trial
from ortlm.builder.tokenizer_trial import tried_tokenizer
from ortlm.errors import BadArtifact, BadCheckpoint, Error
from ortlm.runtime.text.tokenizer import Tokenizer
from tests.runtime import tiny

VOCAB = 400
DOUBLE = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
PREPEND = {"type": "Prepend", "prepend": "x" * 10**6}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
TEMPLATE = {"single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}}
TWICE = {**TEMPLATE, "type": "TemplateProcessing", "single": TEMPLATE["single"] * 2}


def special(name: str, ids: list[int]) -> dict[str, Any]:
    """Return a post-processor that puts the token ``name`` before every text."""
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, *TEMPLATE["single"]],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}},
    }


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


HOSTILE: dict[str, dict[str, Any]] = {
    "replace": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}},
    "prepend": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND] * 3}},
    "one long replacement": {"normalizer": {**DOUBLE, "content": "y" * 10**7}},
    "empty matches": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "ab"}] * 20,
        }
    },
    "bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
    "nested": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Sequence", "pretokenizers": [BYTES]}] * 40,
        }
    },
    "copies": {"post_processor": {"type": "Sequence", "processors": [TWICE] * 30}},
    "many around": {"post_processor": special("<s>", [0] * 10**5)},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 40}},
    "unknown special token": {"post_processor": special("<nothing>", [0])},
    "regex that gives up": {"pre_tokenizer": split(r"(?:\w+\w+)+\w+$|(a|aa)+$|(\s|\s\s)+x")},
    "id beyond the model": {"post_processor": special("<s>", [10**6])},
    "long token": {
        "added_tokens": [
            {"id": 330, "content": "z" * 10**5, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        ]
    },
    "no model": {"model": {"type": "Nothing"}},
    "no object": {"normalizer": []},
}  # fmt: skip


def save(folder: Path, changes: dict[str, Any], config: Any = None) -> Path:
    """Write a tokenizer with ``changes`` to its tokenizer.json."""
    tiny.save(folder, tiny.byte_level())
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")
    if config is not None:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "tokenizer_config.json").write_bytes(text)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers(name: str, tmp_path: Path) -> None:
    save(tmp_path, HOSTILE[name])
    if name == "no object" and Version(tokenizers.__version__) < Version("0.22"):
        pytest.skip("tokenizers 0.21 reads a list as an empty sequence of normalizers, which changes nothing")
    with pytest.raises(BadCheckpoint, match="tokenizer") as caught:
        tried_tokenizer(tmp_path, {"model_type": "llama"}, VOCAB)
    assert "\n" not in str(caught.value)
    # In an artifact: refused at the door, or an error when it is used.
    if name not in ("id beyond the model", "long token"):
        with pytest.raises(BadArtifact) as found:
            Tokenizer.open(tmp_path).encode("a" * 60 + "!" + " " * 60 + "foo")
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"\u00b2": {"content": "x"}}},
        {"added_tokens_decoder": {"9" * 30: {"content": "x"}}},
        {"added_tokens_decoder": {"1": {"content": 5}}},
        {"added_tokens_decoder": {"1": {"content": "x", "lstrip": "yes"}}},
        {"added_tokens_decoder": []},
        {"extra_special_tokens": "x"},
        {"split_special_tokens": "x"},
        {"added_tokens_decoder": {"1": {"content": "\ud800"}}},
        [],
        b"\xff{}",
        b"{",
    ],
    ids=str,
)
def test_settings_of_wrong_types(config: Any, tmp_path: Path) -> None:
    save(tmp_path, {}, config)
    with pytest.raises(BadCheckpoint, match="tokenizer"):
        tried_tokenizer(tmp_path, {"model_type": "llama"}, VOCAB)
    with pytest.raises(BadArtifact, match="tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "a:9", "add_bos_token": True},
        {"bos_token": 5, "eos_token": ["x"], "unk_token": {"content": 3}},
        {"tokenizer_class": 7, "model_max_length": "x", "add_prefix_space": []},
        {"bos_token": "\x00", "pad_token": "x" * 1000, "extra_special_tokens": [None, "", 4]},
    ],
    ids=str,
)
def test_odd_settings_that_do_no_harm(config: Any, tmp_path: Path) -> None:
    save(tmp_path, {}, config)
    tried_tokenizer(tmp_path, {"model_type": "llama"}, VOCAB)
    assert Tokenizer.open(tmp_path).encode("the fox")


def test_a_tokenizer_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.01)
    save(tmp_path, {"version": "1.0", "padding": None})
    with pytest.raises(BadCheckpoint, match="took longer than"):
        tried_tokenizer(tmp_path, {"model_type": "llama", "tokenizer_class": "slow"}, VOCAB)


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {})
    code = "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"
    monkeypatch.setattr(tokenizer_trial, "_CODE", code)
    with pytest.raises(BadCheckpoint, match="ended with SIGABRT, usually since its memory"):
        tried_tokenizer(tmp_path, {"model_type": "llama", "tokenizer_class": "killed"}, VOCAB)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    save(tmp_path, {})
    with pytest.raises(BadCheckpoint, match="no token below 3 of a text"):
        tried_tokenizer(tmp_path, {"model_type": "llama"}, 3)


def test_keyboard_interrupts_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {})
    tokenizer = Tokenizer.open(tmp_path)

    class Interrupted:
        def encode(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_inner", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("x")


def test_texts_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ortlm.runtime.text import tokenizer as runtime

    save(tmp_path, {})
    monkeypatch.setattr(runtime, "MOST_CHARACTERS", 10)
    with pytest.raises(Error, match="the text has 11 characters"):
        Tokenizer.open(tmp_path).encode("x" * 11)
