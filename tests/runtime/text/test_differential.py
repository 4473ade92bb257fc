"""Chat templates render as transformers renders them, to the letter, and refuse what it refuses."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from ortlm.errors import BadOption
from ortlm.runtime.text.chat_template import ChatTemplate
from tests.runtime import tiny
from tests.runtime.text.corpus import PART_TALKS, TALKS, TEMPLATES, TOOLS

DOCUMENTS = [{"title": "t", "text": "x\ny"}, {"title": "ü", "text": ""}]


@pytest.fixture(scope="module")
def reference():
    return PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level(), bos_token="<s>", eos_token="</s>")


def compare(reference, template: str, talk, **options) -> None:
    ours = ChatTemplate({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"})
    variables = {k: options.pop(k) for k in ("enable_thinking", "date_string") if k in options}
    try:
        want = reference.apply_chat_template(
            talk, chat_template=template, tokenize=False, **options, **variables
        )
    except Exception as refused:
        with pytest.raises(BadOption):
            print(refused, "|", ours.render(talk, variables=variables, **options))
        return
    assert ours.render(talk, variables=variables, **options) == want


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_renders_as_transformers_does(reference, template, talk):
    for prompted in (True, False):
        for tools in (None, [], TOOLS, TOOLS * 3):
            compare(reference, TEMPLATES[template], TALKS[talk], tools=tools, add_generation_prompt=prompted)
        compare(
            reference,
            TEMPLATES[template],
            TALKS[talk],
            documents=DOCUMENTS,
            enable_thinking=False,
            date_string="yesterday",
            add_generation_prompt=prompted,
        )
    compare(
        reference, TEMPLATES[template], TALKS[talk], continue_final_message=True, add_generation_prompt=False
    )


@pytest.mark.parametrize("template", ["parts trimmed", "parts in macro"])
@pytest.mark.parametrize("talk", PART_TALKS)
def test_parts_reach_templates_that_look_at_them(reference, template, talk):
    for prompted in (True, False):
        compare(reference, TEMPLATES[template], PART_TALKS[talk], add_generation_prompt=prompted)
    if talk != "image":
        compare(
            reference,
            TEMPLATES[template],
            PART_TALKS[talk],
            continue_final_message=True,
            add_generation_prompt=False,
        )
