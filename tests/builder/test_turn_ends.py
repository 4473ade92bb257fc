"""The tokens that end a turn are found by what the chat template writes after an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ortlm.builder.manifest import stop_tokens
from ortlm.builder.tokenizer_files import read_tokenizer
from ortlm.builder.turn_ends import turn_ends
from tests.runtime import tiny

ENDS = [
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_role|>",
    "[/TURN]",
    "</s>",
]
LOOP = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + END }}{% endfor %}"
TEMPLATES = {
    "each message": LOOP,
    "trimmed, a line after": LOOP.replace("m.content + END", "m.content | trim + ' ' + END + '\\n'"),
    "only within": LOOP.replace("+ END", "+ ('' if loop.last else END)"),
    "only at the end": LOOP.replace("+ END", "+ (END if loop.last else '')"),
    "assistants only": LOOP.replace("+ END", "+ (END if m.role == 'assistant' else '')"),
    "prefixes": LOOP.replace("END }}", "END }}{% if loop.last %}{{ eos_token }}{% endif %}"),
    "parts": LOOP.replace("m.content", "(m.content if m.content is string else m.content[0].text)"),
}


def save(folder: Path, template: str, added: list[str], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    inner = tiny.byte_level()
    tiny.save(folder, inner, chat_template=template, additional_special_tokens=added, **config)
    return folder


def found(folder: Path) -> list[str]:
    tokenizer = read_tokenizer(folder, {"model_type": "llama"})
    by_id = {at: text for text, at in tokenizer.ids.items()}
    return [by_id[at] for at in turn_ends(folder, tokenizer)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("end", ENDS)
def test_what_stands_after_an_answer(name: str, end: str, tmp_path: Path) -> None:
    save(tmp_path, TEMPLATES[name].replace("END", repr(end)), [end, "<|other|>"], eos_token="<s>")
    ends = found(tmp_path)
    # Without an end of its own, a turn ends where the next one begins.
    assert ends[0] == end or name == "only within"
    assert set(ends) <= {end, "<|user|>", "<|assistant|>"}
    assert end in ends


def test_templates_of_publishers(tmp_path: Path) -> None:
    wanted = {"phi-3-mini": "<|end|>", "phi-3.5-mini": "<|end|>", "phi-4-mini": "<|end|>", "llama-3": "<|eot_id|>",
              "chatml": "<|im_end|>"}  # fmt: skip
    for name, end in wanted.items():
        save(tmp_path, tiny.TEMPLATES[name], ["<|eot_id|>", "<|im_end|>", "<|im_start|>"])
        assert found(tmp_path) == [end]


def test_text_that_is_no_mark_ends_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, LOOP.replace("END", "'### Next'"), [], added_tokens_decoder={
        "340": {"content": "###", "special": False}, "341": {"content": "<|soft|>"}})  # fmt: skip
    assert found(folder) == []
    save(tmp_path, LOOP.replace("END", "'<|soft|>'"), [], added_tokens_decoder={
        "341": {"content": "<|soft|>", "special": False}})  # fmt: skip
    assert found(folder) == ["<|soft|>"]


def test_a_template_that_refuses_tells_nothing(tmp_path: Path) -> None:
    assert found(save(tmp_path, "{{ raise_exception('no') }}", ["<|im_end|>"])) == []


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|im_end|>"}},
        {"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}},
        {"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}},
        {"tokenizer_config": {"extra_special_tokens": ["<|im_end|>"], "chat_template": LOOP}},
        {"added_tokens": {"<|im_end|>": 330}, "tokenizer_config": {"chat_template": LOOP}},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_vocabulary", [True, False])
def test_stop_tokens_that_only_the_tokenizer_names(
    files: dict[str, Any], in_vocabulary: bool, tmp_path: Path
) -> None:
    class Checkpoint:
        folder = tmp_path
        config = {"eos_token_id": 1}  # noqa: RUF012

        def json(self, name: str) -> dict[str, Any]:
            return {}

    made = json.loads(tiny.byte_level().to_str())
    at = len(made["model"]["vocab"])
    if in_vocabulary:
        made["model"]["vocab"]["<|im_end|>"] = at
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    for name, content in files.items():
        text = json.dumps(content).replace("END", "'<|im_end|>'")
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    tokenizer = read_tokenizer(tmp_path, {"model_type": "llama"})
    assert stop_tokens(Checkpoint(), 400, tokenizer) == (1, at)  # type: ignore[arg-type]
