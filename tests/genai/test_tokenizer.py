"""Texts, ids and prompts are those of the official tokenizer, and more is taken."""

import json
import shutil

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import ortlm.genai
from tests.genai.conftest import MODULES, plain
from tests.runtime import tiny

TEXTS = ["Hello world, there was", "<|user|>\nhi<|end|>", " two  spaces\n", "naïve 日本 🙂", "a"]
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "x"}]


@pytest.fixture
def tokenizer(model):
    return ortlm.genai.Tokenizer(model)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", ["true", "false"])
def test_text_to_ids_and_back(both, text, skip):
    def program(og, model):
        tokenizer = og.Tokenizer(model)
        tokenizer.update_options(skip_special_tokens=skip)
        ids = tokenizer.encode(text)
        stream = tokenizer.create_stream()
        return str(ids.dtype), ids, tokenizer.decode(ids), [stream.decode(token) for token in ids]

    assert both(program)[0] == "int32"


@pytest.fixture(scope="module", params=["byte_level", "llama_style"])
def other(request, folder, tmp_path_factory):
    """A folder with another tokenizer, which wants BOS."""
    out = tmp_path_factory.mktemp(request.param)
    tiny.save(out, getattr(tiny, request.param)(), tokenizer_class="LlamaTokenizerFast", add_bos_token=True)
    for name in ("genai_config.json", "model.onnx"):
        shutil.copy(folder / name, out)
    return out


def test_streams_keep_the_space_before_a_first_word(other):
    def program(og):
        tokenizer = og.Tokenizer(og.Config(str(other)))
        ids = tokenizer.encode("the hello ẞ the")
        stream = tokenizer.create_stream()
        return plain([ids, [stream.decode(token) for token in ids]])

    theirs, ours = (program(pytest.importorskip(name)) for name in MODULES)
    assert ours == theirs


def test_bos_only_if_asked_for(other):
    tokenizer = ortlm.genai.Tokenizer(str(other))
    ids = tokenizer.encode("the").tolist()
    tokenizer.update_options(add_special_tokens="true")
    assert tokenizer.encode("the").tolist() == [tokenizer.to_token_id("<s>"), *ids]


@pytest.mark.parametrize("kind", [None, "LlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}]
)
@pytest.mark.parametrize("single", [None, "<s> $A"])
def test_special_tokens_are_those_of_the_official_runtime(folder, tmp_path, kind, flags, single):
    inner = tiny.byte_level()
    if single:
        inner.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 0)])
    tiny.save(tmp_path, inner, **flags, **({"tokenizer_class": kind} if kind else {}))
    for name in ("genai_config.json", "model.onnx"):
        shutil.copy(folder / name, tmp_path)

    def program(og):
        tokenizer = og.Tokenizer(og.Config(str(tmp_path)))
        plain_ids = tokenizer.encode("the fox")
        tokenizer.update_options(add_special_tokens="true")
        return plain([plain_ids, tokenizer.encode("the fox")])

    theirs, ours = (program(pytest.importorskip(name)) for name in MODULES)
    assert ours == theirs


def test_batches(both):
    def program(og, model):
        tokenizer = og.Tokenizer(model)
        batch = tokenizer.encode_batch(["a b c d", "Hello"])
        return batch.shape(), batch.as_numpy(), tokenizer.decode_batch(batch)

    both(program)


def test_named_tokens(both):
    def program(og, model):
        tokenizer = og.Tokenizer(model)
        named = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_ids
        return named, tokenizer.to_token_id("<|user|>"), tokenizer.to_token_id("nothing")

    both(program)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [None, "", "{{ messages[0].content }}{{ bos_token }}{{ tools }}"])
@pytest.mark.parametrize("tools", [None, "", '[{"name": "f"}]'])
def test_chat_templates(both, prompt, template, tools):
    def program(og, model):
        options = {"template_str": template, "tools": tools, "add_generation_prompt": prompt}
        if template and not tools:
            options["template_str"] = template.replace("{{ tools }}", "")
        return og.Tokenizer(model).apply_chat_template(json.dumps(MESSAGES), **options)

    assert "Be kind." in both(program)


def test_messages_may_be_lists_and_templates_have_variables(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(json.dumps(MESSAGES))
    made = tokenizer.apply_chat_template(
        MESSAGES, template_str="{{ think }}{{ tools[0].name }}", tools=[{"name": "f"}], think=3
    )
    assert made == "3f"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.update_options(add_special_token="true"), "Did you mean: add_special_tokens"),
        (lambda t: t.update_options(add_special_tokens="perhaps"), 'must be "true" or "false"'),
        (lambda t: t.encode(3), "must be text, found int"),
        (lambda t: t.encode_batch([]), "one text at least"),
        (lambda t: t.decode([-1]), "0 or more"),
        (lambda t: t.decode(np.array([1.5])), "whole numbers"),
        (lambda t: t.decode_batch([1, 2]), "shape"),
        (lambda t: t.apply_chat_template("nope"), "messages is no JSON"),
        (lambda t: t.apply_chat_template('{"role": "user"}'), "must be a list"),
        (lambda t: t.bot_token_id, "not defined"),
    ],
)
def test_what_is_refused(tokenizer, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(tokenizer)
