import json

import pytest
from transformers import PreTrainedTokenizerFast

from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.text.chat_template import ChatTemplate
from tests.runtime import tiny

TALKS = [
    [{"role": "user", "content": "Hi <b>\U0001f600</b> {{ x }}"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2\n"},
        {"role": "user", "content": "sure?"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "caf\u00e9", "parameters": {"b": 1, "a": "<x>"}}}]


@pytest.fixture(scope="module")
def reference():
    return PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level(), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", tiny.TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(reference, name, talk, prompted, tools):
    ours = ChatTemplate({"default": tiny.TEMPLATES[name]}, {"bos_token": "<s>", "eos_token": "</s>"})
    got = ours.render(talk, tools=tools, add_generation_prompt=prompted)
    want = reference.apply_chat_template(
        talk, tools=tools, chat_template=tiny.TEMPLATES[name], add_generation_prompt=prompted, tokenize=False
    )
    assert got == want


def test_raise_exception_reaches_the_caller():
    template = ChatTemplate({"default": tiny.TEMPLATES["chatml"]}, {})
    with pytest.raises(BadOption, match="tool cannot begin"):
        template.render([{"role": "tool", "content": "x"}])


def test_templates_run_in_a_sandbox():
    template = ChatTemplate({"default": "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"}, {})
    with pytest.raises(BadOption, match="refused"):
        template.render([{"role": "user", "content": "x"}])


def test_the_file_of_its_own_wins(tmp_path):
    config = {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.open(tmp_path, {})
    assert found.render([]) == "a"
    assert found.render([], tools=TOOLS) == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert ChatTemplate.open(tmp_path, {}).render([]) == "c"
    with pytest.raises(BadOption, match=r"default, tool_use.*Did you mean: tool_use"):
        found.render([], name="tool_us")


def test_no_template_is_none(tmp_path):
    assert ChatTemplate.open(tmp_path, {}) is None


def test_a_damaged_template_is_named():
    with pytest.raises(BadArtifact, match="line 2"):
        ChatTemplate({"default": "a\n{% if %}"}, {}).render([])


def test_bad_messages_are_named():
    template = ChatTemplate({"default": "x"}, {})
    for bad in ({"content": "x"}, "x", {"role": 1}):
        with pytest.raises(BadOption, match="message 0 must be a mapping"):
            template.render([bad])


def test_lists_of_text_are_joined_and_none_is_dropped():
    template = ChatTemplate({"default": "{{ messages[0].content }}{{ 'name' in messages[0] }}"}, {})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts, "name": None}]) == "abFalse"


def test_date():
    assert ChatTemplate({"default": "{{ strftime_now('%Y') }}"}, {}).render([]).isdigit()
