"""Damaged artifacts and odd input: errors that say what is wrong, and never a wrong answer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ortlm
from ortlm.artifact import from_genai, open_artifact
from ortlm.errors import BadArtifact, BadOption, ContextFull, Error
from ortlm.runtime.sampling.logits_processors import temperature
from ortlm.runtime.sampling.sampler import greedy, multinomial
from ortlm.runtime.sampling.settings import Settings
from ortlm.runtime.text.chat_template import ChatTemplate


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("damage") / "tiny"
    ortlm.build(tiny, out)
    return out


def changed(built, tmp_path, name, path, value):
    """Copy the artifact with the value at ``path`` (a list of keys) in the JSON file ``name`` replaced."""
    folder = Path(shutil.copytree(built, tmp_path / "changed"))
    found = json.loads((folder / name).read_text())
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (folder / name).write_text(json.dumps(found))
    if name == "genai_config.json":
        (folder / "ortlm.json").unlink()
    return folder


DECODER = ["model", "decoder"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["search"], "x"),
        (["model"], []),
        ([*DECODER, "inputs"], 5),
        ([*DECODER, "inputs", "past_key_names"], "past.key"),
        ([*DECODER, "inputs", "past_key_names"], "past.%s.%d"),
        ([*DECODER, "outputs"], "logits"),
        ([*DECODER, "filename"], 7),
        ([*DECODER, "filename"], "../model.onnx"),
        ([*DECODER, "num_hidden_layers"], "x"),
        ([*DECODER, "num_hidden_layers"], 10**30),
        ([*DECODER, "num_hidden_layers"], float("nan")),
        (["model", "vocab_size"], "x"),
        (["model", "context_length"], 0),
        (["model", "eos_token_id"], "x"),
        (["model", "eos_token_id"], ["a"]),
    ],
)
def test_damaged_genai_config(built, tmp_path, path, value):
    with pytest.raises(BadArtifact, match=r"genai_config\.json"):
        open_artifact(changed(built, tmp_path, "genai_config.json", path, value))


GRAPH = ["graphs", "decoder"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ([*GRAPH, "inputs"], 5),
        ([*GRAPH, "inputs", "input_ids"], 5),
        ([*GRAPH, "outputs"], []),
        ([*GRAPH, "optional"], "x"),
        ([*GRAPH, "states"], [{}]),
        ([*GRAPH, "file"], None),
        (["generation"], "x"),
        (["session_options"], [1]),
        (["rope_switch_tokens"], "x"),
        (["context_tokens"], None),
        (["format"], 99),
    ],
)
def test_damaged_manifest(built, tmp_path, path, value):
    with pytest.raises(BadArtifact, match=r"ortlm\.json"):
        open_artifact(changed(built, tmp_path, "ortlm.json", path, value))


def test_nulls_are_as_if_absent(built, tmp_path):
    folder = changed(built, tmp_path, "ortlm.json", ["info"], None)
    assert open_artifact(folder).manifest.info == {}


def test_tensor_that_the_graph_has_not(built, tmp_path):
    folder = changed(built, tmp_path, "ortlm.json", [*GRAPH, "inputs", "input_ids"], "input_idz")
    with pytest.raises(BadArtifact, match=r"no input 'input_idz'.*Did you mean: input_ids"):
        ortlm.load(folder, threads=1)


def test_inputs_that_every_model_needs(built, tmp_path):
    wrong = {"input_ids": "input_ids", "lengths": "attention_mask"}
    folder = changed(built, tmp_path, "ortlm.json", [*GRAPH, "inputs"], wrong)
    with pytest.raises(BadArtifact, match="no input for the attention mask"):
        ortlm.load(folder, threads=1)


def test_deeply_nested_configuration(built, tmp_path):
    folder = Path(shutil.copytree(built, tmp_path / "deep"))
    (folder / "ortlm.json").write_text("[" * 100_000)
    with pytest.raises(BadArtifact, match="cannot be read as JSON"):
        open_artifact(folder)


def test_window_that_the_graph_does_not_apply(built, tmp_path, caplog):
    """The official builder writes Mistral's window into the configuration only: beyond it, text would be wrong."""
    config = json.loads((built / "genai_config.json").read_text())
    config["model"]["decoder"]["sliding_window"] = {"window_size": 8, "layers": []}
    assert from_genai(config, built / "genai_config.json").context_tokens == 8
    assert "does not apply the model's sliding window of 8 tokens" in caplog.text
    config["model"]["decoder"]["sliding_window"]["layers"] = [0, 2]
    assert from_genai(config, built / "genai_config.json").context_tokens == 512


def test_window_ends_the_context(built, tmp_path):
    folder = changed(
        built, tmp_path, "genai_config.json", [*DECODER, "sliding_window"], {"window_size": 8, "layers": []}
    )
    lm = ortlm.load(folder, threads=1)
    assert lm.generate([5] * 6, max_new_tokens=9, ignore_eos=True).finish_reason == "length"
    with pytest.raises(ContextFull, match="holds 8"):
        lm.generate([5] * 9)


def test_text_that_is_not_utf8(built):
    lm = ortlm.load(built, threads=1)
    with pytest.raises(BadOption, match="not UTF-8"):
        lm.generate("a\udcff")


def test_prompt_that_ends_inside_a_character(built):
    """What a prompt of token ids began, the answer completes."""
    tokenizer = ortlm.load(built, threads=1).tokenizer
    ids = tokenizer.encode("x = '\N{GRINNING FACE} hi'", add_special_tokens=False)
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        stream = tokenizer.stream(ids[:cut])
        rest = "".join(stream.push(token) for token in ids[cut:]) + stream.flush()
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + rest == whole


@pytest.mark.parametrize("value", [1e-300, 1e-46, 1e-38, 1e-31])
def test_tiny_temperatures_are_greedy(value):
    logits = np.array([[1.0, 3.0, 2.0, -5.0]], np.float32)
    cooled = temperature(value)(np.zeros((1, 0), np.int64), logits)
    for seed in range(5):
        assert multinomial(cooled, [np.random.default_rng(seed)]) == [1]


@pytest.mark.parametrize("row", [[np.nan] * 4, [1, np.nan, 2, 3], [-np.inf] * 4])
def test_logits_that_are_no_numbers_are_never_answered(row):
    logits = np.array([row], np.float32)
    for sampler in (greedy, multinomial):
        with pytest.raises(Error, match="logits hold NaN"):
            sampler(logits, [np.random.default_rng(0)])
    with pytest.raises(Error, match="logits hold NaN"):
        multinomial(np.array([[1, np.inf, 2, 3]], np.float32), [np.random.default_rng(0)])


@pytest.mark.parametrize("prompt", [None, 5, b"bytes", {"role": "user", "content": "x"}])
def test_prompts_of_another_kind(built, prompt):
    with pytest.raises(BadOption, match="a prompt is a text"):
        ortlm.load(built, threads=1).generate(prompt)


@pytest.mark.parametrize(
    "wrong",
    [{"stop": 5}, {"stop_token_ids": 5}, {"stop_token_ids": ["a"]}, {"do_sample": "yes"}],
)
def test_settings_of_another_kind(wrong):
    with pytest.raises(BadOption):
        Settings(**wrong)


def test_numbers_of_numpy():
    settings = Settings(max_new_tokens=np.int64(3), top_k=np.int32(2), temperature=np.float32(0.5))
    assert (settings.max_new_tokens, settings.top_k, settings.temperature) == (3, 2, 0.5)


def test_publishers_infinity_is_passed_over():
    settings = Settings(do_sample=True).with_defaults({"temperature": float("inf"), "top_k": 7})
    assert (settings.temperature, settings.top_k) == (None, 7)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ 'abc'.index('z') }}",
        "{{ messages[0].content.split('') }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_templates_that_fail(template):
    with pytest.raises(BadOption, match="chat template refused"):
        ChatTemplate({"default": template}, {}).render([{"role": "user", "content": "x"}])
