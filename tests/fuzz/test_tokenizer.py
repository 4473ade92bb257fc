"""Damaged tokenizers and settings: an answer or one line, never a panic, a hang or all memory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ortlm.builder.tokenizer_files import read_tokenizer
from ortlm.builder.turn_ends import turn_ends
from ortlm.errors import Error
from ortlm.runtime.text.tokenizer import Tokenizer
from tests.fuzz.harness import damaged_json, fuzz
from tests.runtime import tiny

TEXT = "the quick <|end|> \n caf\u00e9 \u4f60 1234 don't " * 20
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False},
    "additional_special_tokens": ["<|end|>", "<|im|>"],
    "added_tokens_decoder": {"2": {"content": "<|end|>", "rstrip": True, "special": True}},
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "split_special_tokens": False,
    "clean_up_tokenization_spaces": True,
    "chat_template": "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}",
}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


VOCABULARIES = {
    kind: json.loads(getattr(tiny, kind)().to_str())["model"]["vocab"]
    for kind in ("byte_level", "llama_style")
}


def small(kind: str) -> dict[str, Any]:
    """Return a tokenizer.json without its vocabulary, so that its structure is what gets damaged, and fast."""
    found: dict[str, Any] = json.loads(getattr(tiny, kind)().to_str())
    found["model"] |= {"vocab": kind, "merges": found["model"]["merges"][:3]}
    return found | {"post_processor": TEMPLATE}


def use(folder: Path, tokenizer: Any, settings: Any) -> None:
    """Read the files as a build does and as a runtime does."""
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    if isinstance(model, dict) and model.get("vocab") in tuple(VOCABULARIES):
        model["vocab"] = VOCABULARIES[model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with contextlib.suppress(Error):
        turn_ends(folder, read_tokenizer(folder, {"model_type": "llama"}))
    tokenizer = Tokenizer.open(folder)
    ids = tokenizer.encode(TEXT)
    assert len(ids) < 1_000_000
    stream = tokenizer.stream(ids[:3])
    for token in ids:
        stream.push(token)
    stream.flush()
    tokenizer.decode(ids, skip_special_tokens=False)
    tokenizer.unknown_ids(400)


@fuzz(damaged_json(SETTINGS))
def test_settings(tmp_path_factory: Any, found: Any) -> None:
    use(tmp_path_factory.mktemp("settings"), small("byte_level"), found)


@fuzz(st.one_of(damaged_json(small("byte_level")), damaged_json(small("llama_style"))))
def test_tokenizer(tmp_path_factory: Any, found: Any) -> None:
    use(tmp_path_factory.mktemp("tokenizer"), found, SETTINGS)
