# ruff: noqa: E501 - a template is easier to read in one line
"""Reasoning and content parts reach a chat template in the form that it reads."""

from __future__ import annotations

import logging

import pytest

from ortlm.errors import BadOption
from ortlm.runtime.text.chat_template import ChatTemplate
from tests.runtime.text.corpus import TEMPLATES


def render(source: str, *messages, **options) -> str:
    return ChatTemplate({"default": source}, {}).render(list(messages), **options)


def said(**fields) -> dict:
    return {"role": "assistant", "content": "so", **fields}


READS = {
    "reasoning_content": "{{ messages[0].reasoning_content }}|{{ messages[0].content }}",
    "reasoning": "{% for m in messages %}{% if m['reasoning'] is string %}{{ m['reasoning'] }}{% endif %}|{{ m.content }}{% endfor %}",
    "thinking": "{% for m in messages %}{{ m.get('thinking', '') }}|{{ m.content }}{% endfor %}",
    "thought": "{% for m in messages %}{% if 'thought' in m %}{{ m.thought }}{% endif %}|{{ m.content }}{% endfor %}",
}
GIVEN = [
    {"reasoning_content": "because"},
    {"reasoning": "because"},
    {"thinking": "because"},
    {"thought": "because"},
    {"reasoning_text": "because"},
    {
        "reasoning_details": [
            {"type": "reasoning.text", "text": "be"},
            {"type": "reasoning.text", "text": "cause"},
        ]
    },
    {"thinking_blocks": [{"type": "thinking", "thinking": "because", "signature": "x"}]},
    {"content": [{"type": "thinking", "thinking": "because"}, {"type": "text", "text": "so"}]},
    {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "because"}]},
            {"type": "text", "text": "so"},
        ]
    },
    {"content": [{"type": "reasoning", "text": "because"}, {"type": "output_text", "text": "so"}]},
    {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "because"}]}, "so"]},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("name", READS)
def test_reasoning_comes_under_the_name_that_the_template_reads(name, given):
    assert render(READS[name], said(**given)) == "because|so"


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_reasoning_in_a_template_of_a_family(given):
    talk = [{"role": "user", "content": "why"}, said(**given)]
    assert "<think>\nbecause\n</think>\n\nso" in render(TEMPLATES["thinking tools"], *talk)


def test_what_a_message_says_under_the_right_name_stays():
    both = said(reasoning_content="a", thinking="b", reasoning="c")
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ messages[0].reasoning }}"
    assert render(source, both) == "abc"


def test_templates_with_parts_of_reasoning_get_them():
    talk = said(content=[{"type": "thinking", "thinking": "because"}, {"type": "text", "text": "so"}])
    assert "[THINK]because[/THINK]so" in render(TEMPLATES["parts in macro"], talk)


def test_reasoning_that_no_template_reads_is_told_once(caplog):
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    with caplog.at_level(logging.WARNING, "ortlm"):
        for _ in range(3):
            assert template.render([said(reasoning="because")]) == "so"
    assert [r.message for r in caplog.records] == [
        "the messages hold reasoning, which the model's chat template does not read: it is left out."
    ]


PARTS = [{"type": "text", "text": " a "}, {"type": "text", "text": "b "}]
LOOPS = [
    "{% for m in messages %}{% for p in m.content %}<{{ p.text | trim }}>{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m['content'] %}<{{ p['text'] | trim }}>{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set c = m.content %}{% if c is not string %}{% for p in c %}<{{ p.text|trim }}>{% endfor %}{% endif %}{% endfor %}",
    "{% macro s(x) %}{% for p in x %}<{{ p.text|trim }}>{% endfor %}{% endmacro %}{{ s(messages[0].content) }}",
    "{% macro s(r, x='') %}{% for p in x %}<{{ p.text|trim }}>{% endfor %}{% endmacro %}{{ s(1, x=messages[0].get('content')) }}",
    "{% for m in messages %}{% for p in m.content|selectattr('type', 'equalto', 'text') %}<{{ p.text|trim }}>{% endfor %}{% endfor %}",
    "{{ messages[0].content | map(attribute='text') | map('trim') | map('replace', 'a', '<a>') | map('replace', 'b', '<b>') | join }}",
    "<{{ messages[0].content[0].text|trim }}><{{ messages[0]['content'][1]['text']|trim }}>",
    "{% set ms = messages[0:] %}{% for m in ms %}{% for p in (m.content if m.content else []) %}<{{ p.text|trim }}>{% endfor %}{% endfor %}",
]
TEXTS = [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ '' + m['content'] }}{% endfor %}",
    "{% for m in messages %}{% set c = m.content | default('') %}{{ c }}{% endfor %}",
    "{% for m in messages %}{% for t in m.tool_calls or [] %}{{ t.name }}{% endfor %}{{ m.content }}{% endfor %}",
    "{% macro s(x) %}{{ x }}{% endmacro %}{{ s(messages[0].content) }}",
]


@pytest.mark.parametrize("source", LOOPS)
def test_parts_stay_parts_where_a_template_looks_at_them(source):
    assert render(source, {"role": "user", "content": PARTS}) == "<a><b>"


@pytest.mark.parametrize("source", TEXTS)
def test_parts_are_one_text_elsewhere(source):
    assert render(source, {"role": "user", "content": PARTS}) == " a b "
    assert render(source, {"role": "user", "content": [" a ", "b "]}) == " a b "
    with pytest.raises(
        BadOption, match=r"message 0 has a content part of the type 'image_url'.*takes texts only"
    ):
        render(source, {"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": "x"}]})


@pytest.mark.parametrize(
    "system", ["{{ m.content }}", "{{ m.content | trim }}", "{{ '' + m.content }}", "{{ m.content.strip() }}"]
)
def test_a_role_whose_parts_are_not_looked_at_gets_a_text(system):
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        + system
        + "{% elif m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    talk = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": PARTS},
    ]
    assert render(source, *talk) == "s a b "


def test_the_last_message_can_be_continued():
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    trims = "{% for m in messages %}<{{ m.content|trim }}>{% endfor %}"
    parts = "{% for m in messages %}<{% for p in m.content %}{{ p.text }}{% endfor %}>{% endfor %}"
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert render(source, said(content=" so "), **options) == "< so "
    assert render(trims, said(content=" so "), **options) == "<so"
    assert render(parts, said(content=PARTS), **options) == "< a b "
    for bad in (said(content=None), said(content=5)):
        with pytest.raises(BadOption, match="needs a last message that has a text"):
            render(source, bad, **options)
    with pytest.raises(BadOption, match="leaves out or changes its text"):
        render("{{ messages[0].role }}", said(), **options)
    with pytest.raises(BadOption, match="set one of them to false"):
        render(source, said(), continue_final_message=True)


def test_values_that_are_no_messages_are_told():
    for bad in ("x", 3, ["user", "hi"], {"role": None}, {"content": "x"}):
        with pytest.raises(BadOption, match="message 0 must be a mapping"):
            render("x", bad)
