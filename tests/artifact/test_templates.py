# ruff: noqa: E501 - a template is easier to read in one line
"""Which chat templates a folder has, and what is no template."""

from __future__ import annotations

import json
import os

import pytest
from transformers import PreTrainedTokenizerFast

from ortlm.artifact import read_templates
from ortlm.errors import BadArtifact, BadCheckpoint, BadOption
from ortlm.runtime.text.chat_template import ChatTemplate
from tests.runtime import tiny

NAMED = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "list tools"}]
FOLDERS = {
    "config": {"tokenizer_config.json": {"chat_template": "config"}},
    "list": {"tokenizer_config.json": {"chat_template": NAMED}},
    "file": {"chat_template.jinja": "file"},
    "file over config": {"chat_template.jinja": "file", "tokenizer_config.json": {"chat_template": "config"}},
    "file over list": {"chat_template.jinja": "file", "tokenizer_config.json": {"chat_template": NAMED}},
    "more files": {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "file tools",
                   "additional_chat_templates/rag.jinja": "rag", "tokenizer_config.json": {"chat_template": NAMED}},
}  # fmt: skip


def make(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("files", FOLDERS)
def test_the_same_template_as_in_transformers(files, tmp_path):
    reference = PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level())
    reference.save_pretrained(tmp_path)
    make(tmp_path, FOLDERS[files])
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = ChatTemplate.open(tmp_path, {})
    talk = [{"role": "user", "content": "x"}]
    for tools in (None, [], [{"type": "function", "function": {"name": "f"}}]):
        want = reference.apply_chat_template(talk, tools=tools, tokenize=False)
        assert ours.render(talk, tools=tools) == want
    if isinstance(reference.chat_template, dict):
        assert ours.templates == reference.chat_template


def test_places_of_older_versions(tmp_path):
    make(tmp_path, {"chat_template.json": {"chat_template": "json"}})
    assert read_templates(tmp_path) == {"default": "json"}
    make(tmp_path, {"tokenizer_config.json": {"chat_template": {"default": "object"}}})
    assert read_templates(tmp_path) == {"default": "object"}
    # transformers has no default here; the configuration's is better than none.
    make(tmp_path, {"additional_chat_templates/tool_use.jinja": "tools"})
    assert read_templates(tmp_path) == {"default": "object", "tool_use": "tools"}


@pytest.mark.parametrize(
    "value",
    [
        7,
        True,
        [1],
        ["x"],
        [{"template": "x"}],
        [{"name": ["x"], "template": "x"}],
        [{"name": {}, "template": "x"}],
        [{"name": "x"}],
        [{"name": "x", "template": 5}],
        [{"name": "x", "template": None}],
        {"default": ["x"]},
        [{"name": str(i), "template": "x"} for i in range(1000)],
        "x" * 1_000_000,
    ],
    ids=lambda v: repr(v)[:40],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_what_is_no_template_is_told(file, value, tmp_path):
    make(tmp_path, {file: {"chat_template": value}})
    for error in (BadArtifact, BadCheckpoint):
        with pytest.raises(error, match=rf'{file}: "chat_template"'):
            read_templates(tmp_path, error)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_files_that_are_no_text(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff\xfe{{")
    with pytest.raises(BadArtifact, match=r"jinja is not UTF-8"):
        ChatTemplate.open(tmp_path, {})
    path.write_bytes(b"x" * 1_000_000)
    with pytest.raises(BadArtifact, match=r"jinja has more than 524,288 bytes"):
        ChatTemplate.open(tmp_path, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(BadArtifact, match=r"jinja (cannot be read|is not a regular file)"):
        ChatTemplate.open(tmp_path, {})
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(BadArtifact, match="not a regular file"):
        ChatTemplate.open(tmp_path, {})


def test_too_many_templates(tmp_path):
    make(tmp_path, {f"additional_chat_templates/{i}.jinja": "x" for i in range(101)})
    with pytest.raises(BadArtifact, match="has 101 chat templates; at most 100"):
        ChatTemplate.open(tmp_path, {})


def test_several_without_a_default_need_a_name(tmp_path):
    make(tmp_path, {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n} for n in "ab"]}})
    found = ChatTemplate.open(tmp_path, {})
    assert found.render([], name="b") == "b"
    with pytest.raises(BadOption, match="there is no chat template 'default'; there is a, b"):
        found.render([])
