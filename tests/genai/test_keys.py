"""Every key of genai_config.json is obeyed, refused by name, or written down as without effect."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

import ortlm
import ortlm.genai as og
from ortlm.artifact.genai_keys import GENAI_SEARCH, GENAI_SPECULATIVE, NOT_SUPPORTED, WITHOUT_EFFECT, keys
from ortlm.errors import BadArtifact
from tests.genai.conftest import MODULES, finish, generator
from tests.genai.graphs import remade
from tests.runtime.conftest import build_official

DOCS = Path(ortlm.__file__).parents[2] / "docs/genai-reference.md"
# What is obeyed; the tests below, and those of the other files here, show how.
OBEYED = {
    "model": "type tokenizer_dir context_length vocab_size eos_token_id pad_token_id bos_token_id bot_token_id "
    "eot_token_id bor_token_id eor_token_id vision embedding",
    "model.decoder": "filename session_options num_key_value_heads head_size num_hidden_layers layer_types",
    "model.decoder.sliding_window": "window_size slide_key_value_cache layers",
    "model.decoder.inputs": "input_ids inputs_embeds attention_mask position_ids past_key_names past_value_names "
    "past_names",
    "model.decoder.outputs": "logits hidden_states present_key_names present_value_names present_names",
    "search": "batch_size do_sample early_stopping length_penalty max_length min_length no_repeat_ngram_size "
    "num_beams num_return_sequences random_seed repetition_penalty temperature top_k top_p",
    "speculative": "max_draft_tokens ngram_size ngram_chained_lookup min_adaptive_k",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the official builder."""
    pytest.importorskip("onnxruntime_genai")
    return build_official(tmp_path_factory.getbasetemp())[0]


def set_key(key, value):
    """Return a function that sets the key in a configuration; None removes it."""

    def change(found):
        *parents, last = key.split(".")
        for parent in parents:
            found = found.setdefault(parent, {})
        if value is None:
            found.pop(last, None)
        else:
            found[last] = value

    return change


def run(og, folder):
    """Return what a program sees of a folder: a sequence, the longest length, stop tokens, logits."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    made = og.Generator(model, params)
    made.append_tokens(np.array([5, 6, 7], np.int32))
    logits = np.zeros((1, 1, 352), np.float32)
    logits[..., 9] = 9
    made.set_logits(logits)
    made.generate_next_token()
    return (
        made.get_sequence(0).tolist(),
        params.get_search_options()["max_length"],
        og.Tokenizer(model).eos_token_ids.tolist(),
        (made.get_logits()[..., :330].round(2) + 0).tolist(),
    )


def test_every_key_is_accounted_for():
    obeyed = {f"{at}.{name}" for at, names in OBEYED.items() for name in names.split()}
    told = [*obeyed, *WITHOUT_EFFECT, *NOT_SUPPORTED]
    assert len(set(told)) == len(told)
    assert {*told} == set(keys())


def test_every_key_without_effect_or_support_is_documented():
    text = DOCS.read_text()
    for key in (*WITHOUT_EFFECT, *NOT_SUPPORTED):
        assert f"`{key.rpartition('.')[2]}`" in text, key
    for name in (*GENAI_SEARCH, *GENAI_SPECULATIVE):
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("key", sorted(NOT_SUPPORTED))
def test_what_is_not_supported_is_refused_by_name(base, tmp_path, key):
    folder = remade(
        base, tmp_path / "folder", config=set_key(key, "past.%d" if "puts" in key else {"filename": "a"})
    )
    for opens in (og.Config, og.Model, ortlm.load):
        with pytest.raises(ortlm.errors.Error, match=key):
            opens(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.bos_token_id", None),
        ("model.eos_token_id", [2, 3]),
        ("model.eos_token_id", []),
        ("model.eos_token_id", None),
        ("model.pad_token_id", None),
        ("model.context_length", 128.0),
        ("model.decoder.inputs.attention_mask", None),
        ("model.decoder.inputs.position_ids", "position_ids"),
        ("model.decoder.inputs", None),
        ("model.decoder.outputs", None),
        ("model.decoder.hidden_size", None),
        ("model.decoder.layer_types", ["full_attention"] * 3),
        ("model.decoder.conv_cache_size", 3),
        ("model.decoder.session_options", None),
        ("model.decoder.run_options", {}),
        ("model.image_token_id", 5),
        ("model.sep_token_id", 5),
        ("model.num_mels", 5),
        ("search", None),
        ("search.max_length", 0),
        ("search.max_length", 64),
        ("search.max_length", None),
        ("search.past_present_share_buffer", False),
        ("search.past_present_share_buffer", None),
        ("search.chunk_size", 2),
        ("search.diversity_penalty", 0.5),
        ("search.blank_penalty", 0.5),
        ("search.min_length", 5),
        ("engine", {"static_batching": {"max_batch_size": 4}}),
        ("another_key", 1),
    ],
)
def test_both_modules_read_the_same(base, tmp_path, key, value):
    folder = remade(base, tmp_path / "folder", config=set_key(key, value))
    theirs, ours = (run(pytest.importorskip(name), folder) for name in MODULES)
    assert ours[:3] == theirs[:3]
    np.testing.assert_allclose(ours[3], theirs[3], atol=0.02)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.bos_token_id", [0, 1]),
        ("model.pad_token_id", [2]),
        ("model.context_length", None),
        ("model.context_length", 0),
        ("model.context_length", "128"),
        ("model.eos_token_id", "end"),
        ("model.unknown", 1),
        ("model.decoder.unknown", 1),
        ("model.decoder.inputs.unknown", "a"),
        ("model.decoder.sliding_window", {"unknown": 16}),
        ("model.decoder.layer_types", ["conv"] * 3),
        ("model.decoder.filename", "../model.onnx"),
        ("model.decoder.filename", "/model.onnx"),
        ("search.unknown", 1),
        ("search.top_k", 1.5),
        ("search.do_sample", 1),
        ("search.max_length", 500),
        ("speculative", {"unknown": 2}),
        ("speculative", {"cooldown": 2}),
        ("speculative", {"ngram_chained_lookup": 2}),
        ("speculative", {"ngram_chained_lookup": True}),
        ("speculative", {"ngram_size": 1}),
        ("speculative", {"max_draft_tokens": 30}),
        ("speculative", {"min_adaptive_k": 17}),
        ("another_section", {"a": 1}),
        ("model.tokenizer_dir", "nowhere"),
        ("model.tokenizer_dir", "../elsewhere"),
        ("model.decoder.session_options.provider_options", [{"cuda": {}}]),
        ("model.decoder.session_options.provider_options", [{"CPU": {"use_arena": "1"}}]),
        ("model.decoder.session_options.provider_options", [{"nothing": {}}]),
    ],
)
def test_both_modules_refuse_the_same(base, tmp_path, key, value):
    folder = remade(base, tmp_path / "folder", config=set_key(key, value))
    for name in MODULES:
        with pytest.raises(RuntimeError) as found:
            run(pytest.importorskip(name), folder)
    last = next(iter(value)) if isinstance(value, dict) else key.rpartition(".")[2]
    names = {"provider_options": "", "filename": "model.onnx"}
    assert names.get(last, last) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.encoder", {"filename": "encoder.onnx"}, "an encoder-decoder model"),
        ("model.decoder.inputs.cross_past_key_names", "past_key_cross_%d", "an encoder"),
        ("model.speech", {"filename": "speech.onnx"}, "speech"),
        (
            "model.vision",
            {"filename": "vision.onnx"},
            "model.vision: a model of type 'llama' that reads images",
        ),
        ("model.decoder.inputs.past_conv_names", "past_conv.%d", "a recurrent or convolutional state"),
        ("model.decoder.num_hidden_layers", 0, "without layers that keep keys and values"),
        ("model.decoder.num_hidden_layers", None, "is missing. A model without layers"),
        ("model.decoder.num_hidden_layers", 4, "no cache tensor 'past_key_values.3.key'"),
        ("model.decoder.inputs.past_key_names", "past.%d.key", "no cache tensor 'past.0.key'"),
        ("model.decoder", None, "model.decoder"),
    ],
)
def test_what_is_refused_says_what_it_is(base, tmp_path, key, value, message):
    folder = remade(base, tmp_path / "folder", config=set_key(key, value))
    with pytest.raises(BadArtifact, match=message) as found:
        ortlm.load(folder).generate([5, 6, 7], max_new_tokens=1)
    assert "damaged" not in str(found.value)


def test_a_length_that_the_folder_itself_names_is_cut_to_what_its_graph_is_right_for(base, tmp_path, caplog):
    window = {"window_size": 16, "slide_key_value_cache": False, "slide_inputs": False, "layers": []}
    folder = remade(base, tmp_path / "folder", config=set_key("model.decoder.sliding_window", window))
    with caplog.at_level(logging.WARNING):
        model = og.Model(folder)
    assert "window of 16 tokens" in caplog.text
    made = og.Generator(model, og.GeneratorParams(model))
    made.append_tokens([5, 6, 7])
    finish(made)
    assert made.token_count() <= 16
    generator(og, model, max_length=16)
    for params in ({"max_length": 17}, {"max_length": 128}):
        with pytest.raises(og.GenaiError, match=r"max_length \(\d+\) cannot be greater than .* \(16\)"):
            generator(og, model, **params)
    config = og.Config(folder)
    config.overlay('{"search": {"max_length": 100}}')
    model = og.Model(config)
    with pytest.raises(og.GenaiError, match=r"max_length \(100\) cannot be greater"):
        og.Generator(model, og.GeneratorParams(model))


def test_files_in_other_places(base, tmp_path):
    folder = remade(
        base,
        tmp_path / "folder",
        config=lambda found: (
            set_key("model.decoder.filename", "graphs/model.onnx")(found),
            set_key("model.tokenizer_dir", "text")(found),
        ),
    )
    for name, files in {
        "graphs": ("model.onnx", "model.onnx.data"),
        "text": ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }.items():
        (folder / name).mkdir()
        for file in files:
            (folder / file).rename(folder / name / file)
    theirs, ours = (run(pytest.importorskip(name), folder) for name in MODULES)
    assert ours[:3] == theirs[:3]
    assert ortlm.load(folder).generate("hello", max_new_tokens=2).token_ids
    tokenizer = og.Tokenizer(folder)
    assert tokenizer.encode("hello").tolist() == og.Tokenizer(base).encode("hello").tolist()
    assert "hello" in tokenizer.apply_chat_template('[{"role": "user", "content": "hello"}]')


def test_weights_under_another_name(base, tmp_path):
    def change(graph):
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "weights.bin"

    folder = remade(base, tmp_path / "folder", change)
    (folder / "model.onnx.data").rename(folder / "weights.bin")
    theirs, ours = (run(pytest.importorskip(name), folder) for name in MODULES)
    assert ours[:3] == theirs[:3]


def test_a_configuration_of_the_first_versions(base, tmp_path):
    def first(found):
        model = found["model"]
        for key in ("eos_token_id", "pad_token_id", "type", "vocab_size", "context_length"):
            assert key in model
        model["decoder"]["session_options"] = {"log_id": "onnxruntime-genai", "provider_options": []}
        found["search"] = {
            "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0,
            "max_length": 128, "min_length": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
            "num_return_sequences": 1, "past_present_share_buffer": True, "repetition_penalty": 1.0,
            "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        }  # fmt: skip

    folder = remade(base, tmp_path / "folder", config=first)
    theirs, ours = (run(pytest.importorskip(name), folder) for name in MODULES)
    assert ours[:3] == theirs[:3]


@pytest.mark.parametrize(
    ("provider", "key", "value", "message"),
    [
        (
            "cpu",
            "arena_extend_strategy",
            "kSameAsRequested",
            "the CPU has no options, found 'arena_extend_strategy'",
        ),
        ("cuda", "device_id", "0", "has no cuda; it has cpu. Install it with: pip install 'onnxruntime-gpu"),
        ("cuda", "device_idd", "0", "Did you mean: device_id"),
        ("cuda", "gpu_mem_limit", "many", "takes a whole number from 1 on, found 'many'"),
        ("cuda", "enable_cuda_graph", "maybe", "takes 0 or 1, found 'maybe'"),
        ("webgpu", "enableGraphCapture", "1", "option enableGraphCapture='1' of"),
    ],
)
def test_provider_options_are_never_dropped(base, provider, key, value, message):
    config = og.Config(base)
    config.clear_providers()
    config.set_provider_option(provider, key, value)
    with pytest.raises(og.GenaiError, match=message):
        og.Model(config)


def test_provider_options_reach_onnx_runtime(base, monkeypatch):
    from ortlm.runtime.engine import devices, session

    seen = {}
    real = session.onnxruntime.InferenceSession

    def watched(model, settings, *, providers, provider_options):
        seen.update(zip(providers, provider_options, strict=True))
        return real(model, settings, providers=["CPUExecutionProvider"])

    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(session.onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(session.onnxruntime, "InferenceSession", watched)
    monkeypatch.setattr(devices, "cuda_gpus", lambda: (devices.CudaGpu("GPU", 1),) * 2)
    config = og.Config(base)
    config.clear_providers()
    config.append_provider("cuda")
    config.set_provider_option("cuda", "device_id", "1")
    config.set_provider_option("cuda", "enable_cuda_graph", "0")
    # What ONNX Runtime gives instead, silently, is refused.
    with pytest.raises(og.GenaiError, match="could not start CUDAExecutionProvider"):
        og.Model(config)
    cuda = {"device_id": "1", "enable_cuda_graph": "0"}
    assert seen == {"CUDAExecutionProvider": cuda, "CPUExecutionProvider": {}}


@pytest.mark.parametrize(
    "options",
    [
        {"ngram_size": 2, "ngram_chained_lookup": True},
        {"ngram_size": 3, "min_adaptive_k": 3, "cooldown": True},
        {"ngram_size": 16, "max_draft_tokens": 16},
    ],
)
def test_drafts_of_every_kind_change_nothing(base, options):
    model = og.Model(base)

    def program(**given):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=100)
        params.set_speculative_options(**given)
        made = og.Generator(model, params)
        made.append_tokens([5, 6, 7, 8] * 8)
        finish(made)
        return made.get_sequence(0).tolist(), made._inner.proposed_tokens

    alone, drafted = program(), program(**options)
    assert drafted[0] == alone[0]
    assert drafted[1] > 0


@pytest.mark.parametrize(
    "overlay",
    [
        {"model": {"decoder": {"inputs": {"foo": "a"}}}},
        {"speculative": {"ngram": 2}},
        {"model": {"decoder": {"x": 1}}},
    ],
)
def test_overlays_know_every_key(base, overlay):
    for name in MODULES:
        config = pytest.importorskip(name).Config(str(base))
        with pytest.raises(RuntimeError):
            config.overlay(json.dumps(overlay))
