"""Arguments of every kind: what both modules return, or the kind of error that both raise."""

import json

import numpy as np
import pytest

from tests.genai.conftest import MODULES, generator
from tests.runtime.conftest import build_official

MESSAGES = json.dumps([{"role": "user", "content": "hi"}])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the official builder."""
    pytest.importorskip("onnxruntime_genai")
    return build_official(tmp_path_factory.getbasetemp())[0]


def ids(*tokens):
    return np.array(tokens, np.int32)


def started(og, model, **options):
    made = generator(og, model, max_length=20, **options)
    made.append_tokens(ids(5, 6, 7))
    return made


def stepped(og, model):
    """A generator after one step whose token is given."""
    made = started(og, model)
    logits = np.zeros((1, 1, 352), np.float32)
    logits[..., 9] = 9
    made.set_logits(logits)
    made.generate_next_token()
    return made


def outcome(call, og, model):
    """Return what ``call`` returns, or the kind of error."""
    try:
        found = call(og, model)
    except TypeError:
        return "TypeError"
    except RuntimeError:
        return "RuntimeError"
    if isinstance(found, og.Tensor):
        found = found.as_numpy()
    return (found.dtype.name, found.tolist()) if isinstance(found, np.ndarray) else found


def same(base, load, call):
    theirs, ours = (outcome(call, *load(name, base)) for name in MODULES)
    assert ours == theirs
    return ours


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 6],
        (5, 6),
        ids(5, 6),
        np.array([5, 6], np.int64),
        np.array([[5, 6]], np.int32),
        5,
        np.int32(5),
        [True],
        [],
        np.zeros((1, 0), np.int32),
        "abc",
        None,
    ],
    ids=str,
)
def test_tokens(base, load, tokens):
    def program(og, model):
        made = generator(og, model, max_length=20)
        made.append_tokens(tokens)
        return made.get_sequence(0)

    same(base, load, program)


@pytest.mark.parametrize(
    "call",
    [
        lambda og, model: started(og, model).get_sequence("a"),
        lambda og, model: started(og, model).get_sequence(None),
        lambda og, model: started(og, model).get_sequence(2.0),
        lambda og, model: started(og, model).get_sequence(np.int64(0)),
        lambda og, model: stepped(og, model).rewind_to(-1),
        lambda og, model: stepped(og, model).rewind_to(2.0),
        lambda og, model: stepped(og, model).rewind_to("a"),
        lambda og, model: stepped(og, model).rewind_to(None),
        lambda og, model: stepped(og, model).rewind_to(9),
        lambda og, model: stepped(og, model).get_sequence(0),
        lambda og, model: stepped(og, model).get_next_tokens(),
        lambda og, model: stepped(og, model).token_count(),
        lambda og, model: stepped(og, model).is_done(),
        lambda og, model: generator(og, model).get_sequence(0),
        lambda og, model: generator(og, model).token_count(),
        lambda og, model: generator(og, model).is_done(),
        lambda og, model: generator(og, model).get_output("logits"),
        lambda og, model: generator(og, model).get_input("input_ids"),
        lambda og, model: started(og, model).get_output(None) if og.__name__ == "ortlm.genai" else _fails(),
        lambda og, model: started(og, model).get_output("nothing"),
        lambda og, model: started(og, model).snapshot_state(),
        lambda og, model: started(og, model).set_logits(np.zeros(10, np.float32)),
        lambda og, model: started(og, model).set_logits(np.zeros((1, 352), np.float64)),
        lambda og, model: started(og, model).set_inputs(og.NamedTensors()),
        lambda og, model: started(og, model).set_active_adapter(None, "x"),
        lambda og, model: started(og, model).set_active_adapter(og.Adapters(model), "x"),
        lambda og, model: started(og, model).set_runtime_option("terminate_session", 1),
        lambda og, model: started(og, model).set_runtime_option("terminate_session", "2"),
        lambda og, model: started(og, model).set_runtime_option("terminate_session", "0"),
        lambda og, model: og.Adapters(model).unload("x"),
        lambda og, model: og.Adapters(model).load("/nothing", "x"),
        lambda og, model: og.Adapters(5),
        lambda og, model: og.Generator(model),
        lambda og, model: og.Generator(model, 5),
        lambda og, model: og.GeneratorParams(5),
        lambda og, model: og.GeneratorParams("a"),
        lambda og, model: og.Model(5),
        lambda og, model: og.Model("/nothing"),
        lambda og, model: og.Tokenizer("/nothing"),
        lambda og, model: model.create_multimodal_processor(),
        lambda og, model: model.create_streaming_processor(),
        lambda og, model: (model.type, model.device_type),
    ],
)
def test_generators_and_models(base, load, call):
    same(base, load, call)


def _fails():
    raise TypeError


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": 1},
        {"do_sample": 0},
        {"top_k": 5.5},
        {"max_length": None},
        {"max_length": 0},
        {"max_length": -3},
        {"num_return_sequences": 0},
        {"nothing": 1},
        {"max_length": "a"},
        {"num_beams": 0},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_search_options(base, load, options):
    assert same(base, load, lambda og, model: bool(generator(og, model, **options))) == "RuntimeError"


@pytest.mark.parametrize(
    "options",
    [
        {"ngram_size": 1},
        {"ngram_size": 17},
        {"ngram_size": 2.5},
        {"ngram_size": -1},
        {"max_draft_tokens": 0},
        {"max_draft_tokens": 17},
        {"min_adaptive_k": 17},
        {"ngram_chained_lookup": 2},
        {"ngram_chained_lookup": True},
        {"cooldown": 2},
        {"cooldown": -1},
        {"nothing": 1},
        {"cooldown": True},
        {"ngram_size": 2, "min_adaptive_k": 4},
        {"ngram_size": 16, "max_draft_tokens": 16, "ngram_chained_lookup": True},
    ],
    ids=str,
)
def test_speculative_options(base, load, options):
    def program(og, model):
        params = og.GeneratorParams(model)
        params.set_speculative_options(**options)
        og.Generator(model, params)
        return params.get_speculative_options()

    same(base, load, program)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("x", "y"),
        ("", ""),
        ("regex", ""),
        ("json_schema", "{"),
        ("regex", "[0-9]+"),
        ("json_schema", '{"type": "object"}'),
    ],
)
def test_guidance(base, load, kind, data):
    def program(og, model):
        params = og.GeneratorParams(model)
        params.set_guidance(type=kind, data=data, enable_ff_tokens=False)
        og.Generator(model, params)

    same(base, load, program)


@pytest.mark.parametrize(
    "call",
    [
        *(
            lambda t, text=text: t.encode(text)
            for text in ("hello", "", "Hello, été 你好 🙂", "<|end|>x", "a\nb", b"x", 5)
        ),
        *(
            lambda t, given=given: t.decode(given)
            for given in ([5, 6], ids(5, 6).reshape(2, 1), [], "a", None)
        ),
        *(
            lambda t, texts=texts: t.encode_batch(texts)
            for texts in (["hello", "a b c"], ("a", "b"), [""], [], "hello", None, ["a", 5])
        ),
        *(
            lambda t, texts=texts: t.decode_batch(t.encode_batch(texts))
            for texts in (["hello", "a b c"], ["a"])
        ),
        lambda t: t.decode_batch(None),
        *(lambda t, name=name: t.to_token_id(name) for name in ("hello", "<|end|>", "", 5)),
        *(
            lambda t, options=options: (
                t.update_options(**options),
                t.encode("hi<|end|>").tolist(),
                t.decode(ids(5, 2, 6)),
            )
            for options in (
                {"add_special_tokens": "true"},
                {"skip_special_tokens": "false"},
                {"skip_special_tokens": False},
                {"add_special_tokens": True},
                {"nothing": "true"},
                {},
            )
        ),
        lambda t: t.update_options("a"),
        lambda t: t.apply_chat_template(MESSAGES),
        lambda t: t.apply_chat_template(messages=MESSAGES, add_generation_prompt=False),
        lambda t: t.apply_chat_template("[]"),
        lambda t: t.apply_chat_template("{"),
        lambda t: t.apply_chat_template(MESSAGES, template_str="{{ messages[0]['content'] }}!"),
        lambda t: t.apply_chat_template(MESSAGES, template_str=""),
        lambda t: t.apply_chat_template(MESSAGES, template_str=None, tools=None),
        lambda t: t.apply_chat_template(MESSAGES, tools='[{"type": "function", "function": {"name": "f"}}]'),
        lambda t: t.apply_chat_template(MESSAGES, tools="{"),
        lambda t: t.apply_chat_template(MESSAGES, template_str="{% for %}"),
        lambda t: t.apply_chat_template(MESSAGES, "x"),
        *(
            lambda t, tokens=tokens: [t.create_stream().decode(token) for token in tokens]
            for tokens in ([5, 6], [2], [np.int64(5)], [None], ["a"], [5.0])
        ),
        *(
            lambda t, name=name: getattr(t, name)
            for name in ("bos_token_id", "pad_token_id", "eos_token_ids", "bot_token_id", "eor_token_id")
        ),
    ],
)
def test_tokenizers(base, load, call):
    same(base, load, lambda og, model: call(og.Tokenizer(model)))


def test_streams_show_whole_characters(base, load):
    def program(og, model):
        tokenizer = og.Tokenizer(model)
        stream = tokenizer.create_stream()
        return [stream.decode(token) for token in tokenizer.encode("Hello, été 你好 🙂 x").tolist()]

    assert "".join(same(base, load, program)) == "Hello, été 你好 🙂 x"


def named(og):
    tensors = og.NamedTensors()
    tensors["a"] = np.zeros(2, np.int32)
    tensors["b"] = og.Tensor(np.ones((1, 2), np.float32))
    return tensors


@pytest.mark.parametrize(
    "call",
    [
        *(
            lambda og, array=array: (og.Tensor(array).shape(), og.Tensor(array).as_numpy())[0]
            for array in (
                np.zeros((2, 3), np.float32),
                np.zeros(0, np.int32),
                np.array(5, np.int32),
                np.zeros(2, bool),
            )
        ),
        *(
            lambda og, array=array: og.Tensor(array)
            for array in ([1, 2], None, 5, np.array("a"), np.zeros(2, np.complex64))
        ),
        lambda og: sorted(named(og).keys()),
        lambda og: (len(named(og)), "a" in named(og), "c" in named(og)),
        lambda og: named(og)["b"],
        lambda og: named(og)["c"],
        lambda og: named(og)[0],
        lambda og: 5 in named(og),
        lambda og: named(og).__delitem__("a"),
        lambda og: named(og).__delitem__("z"),
        lambda og: named(og).__setitem__("a", [1, 2]),
        lambda og: named(og).__setitem__("a", None),
        lambda og: named(og).__setitem__(5, np.zeros(1, np.int32)),
        lambda og: og.set_log_options(nothing=True),
        lambda og: og.set_log_options(enabled="x"),
        lambda og: og.set_log_options(filename=5),
        lambda og: og.set_log_options(filename=None),
        lambda og: og.set_log_options(enabled=False),
        lambda og: og.set_log_options(),
        lambda og: og.set_log_callback(5),
        lambda og: og.set_log_callback(),
        lambda og: og.set_log_callback(None),
        lambda og: og.is_cuda_available(),
        lambda og: og.is_dml_available(),
        lambda og: og.is_cuda_available(1),
        lambda og: og.register_execution_provider_library("x", "/nothing.so"),
        lambda og: og.register_execution_provider_library(1, 2),
        lambda og: og.unregister_execution_provider_library("x"),
        lambda og: og.Images.open("/nothing"),
        lambda og: og.Images.open(),
        lambda og: og.Images.open(5),
        lambda og: og.Audios.open("/nothing"),
    ],
)
def test_the_rest(base, load, call):
    same(base, load, lambda og, model: call(og))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.append_provider("cpu"),
        lambda config: config.append_provider("CPUExecutionProvider"),
        lambda config: config.append_provider("nothing"),
        lambda config: config.append_provider(""),
        lambda config: config.append_provider(5),
        lambda config: config.clear_providers(),
        lambda config: config.set_provider_option("cpu", "a", "b"),
        lambda config: config.set_provider_option("cpu", "a"),
        lambda config: config.set_provider_option("cpu", "a", 1),
        lambda config: config.overlay("{}"),
        lambda config: config.overlay({}),
        lambda config: config.add_model_data("x", "y"),
        lambda config: config.add_model_data("x", 5),
        lambda config: config.add_model_data("x", np.zeros(3, np.uint8)),
        lambda config: config.add_model_data("x", bytearray(3)),
        lambda config: config.add_model_data("x", np.zeros((3, 2), np.uint8)),
        lambda config: config.add_model_data("x", np.zeros(3, np.float32)),
        lambda config: config.remove_model_data("x"),
        lambda config: config.clear_decoder_provider_options_hardware_device_type("cpu"),
        lambda config: type(config).from_package_ep("/nothing", "cpu"),
    ],
)
def test_configurations(base, load, change):
    def program(og, model):
        config = og.Config(str(base))
        change(config)
        return og.Model(config).device_type

    same(base, load, program)
