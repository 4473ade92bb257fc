"""What a program changes before it loads the model."""

import json
from pathlib import Path

import numpy as np
import pytest

import ortlm.genai as og
from ortlm.runtime.engine.devices import DeviceRequest
from tests.genai.conftest import MODULES, finish, generator, plain


@pytest.fixture
def config(folder):
    return og.Config(str(folder))


@pytest.mark.parametrize(
    "overlay",
    [
        {"model": {"eos_token_id": [5, 6]}},
        {"model": {"eos_token_id": 7, "pad_token_id": 9}},
        {"search": {"max_length": 99, "batch_size": 3, "do_sample": True}},
        {"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}},
    ],
)
def test_overlays_mean_the_same_in_both_modules(folder, overlay):
    def program(og):
        config = og.Config(str(folder))
        config.overlay(json.dumps(overlay))
        model = og.Model(config)
        tokenizer = og.Tokenizer(model)
        options = og.GeneratorParams(model).get_search_options()
        return plain(
            [tokenizer.eos_token_ids, tokenizer.pad_token_id, model.type, model.device_type]
        ), options

    theirs, ours = (program(pytest.importorskip(name)) for name in MODULES)
    assert ours == theirs


def test_stop_tokens_of_an_overlay_end_answers(folder, model):
    made = generator(og, model, max_length=20)
    made.append_tokens(np.array([5, 6, 7], np.int32))
    first = finish(made)[0][0]
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"eos_token_id": [first]}}))
    made = generator(og, og.Model(config), max_length=20)
    made.append_tokens(np.array([5, 6, 7], np.int32))
    assert finish(made) == [[first]]


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("nope", "the overlay cannot be read as JSON"),
        ("[]", "must hold an object"),
        ('{"serch": {}}', "Did you mean: search"),
        ('{"search": {"top_kk": 1}}', "search.top_kk.*Did you mean: top_k"),
        ('{"search": {"top_k": 1.5}}', "a whole number"),
        ('{"search": {"do_sample": 1}}', "true or false"),
        ('{"search": {"temperature": "hot"}}', "a number"),
        ('{"search": []}', "object at search"),
        ('{"model": {"vocab_size": "many"}}', "a number"),
        ('{"model": {"decoder": {"hidden": 3}}}', "Did you mean: hidden_size"),
    ],
)
def test_overlays_that_are_refused(config, overlay, message):
    with pytest.raises(RuntimeError, match=message):
        config.overlay(overlay)
    assert config._found == og.Config(config._folder)._found


@pytest.mark.parametrize("provider", ["cpu", "CPU", "CPUExecutionProvider"])
def test_providers_by_any_name(config, provider):
    config.clear_providers()
    config.append_provider(provider)
    assert og.Model(config).device_type == "CPU"


def test_options_name_their_provider(config):
    config.append_provider("cuda")
    config.set_provider_option("CUDAExecutionProvider", "enable_cuda_graph", "0")
    assert config._facts().providers == (("cuda", {"enable_cuda_graph": "0"}),)
    config.clear_providers()
    assert config._facts().providers == ()


def test_a_provider_that_is_not_installed(config):
    config.append_provider("qnn")
    with pytest.raises(RuntimeError, match="has no qnn; it has cpu"):
        og.Model(config)


def test_a_graph_from_memory(config, folder, load):
    config.add_model_data("model.onnx", (folder / "model.onnx").read_bytes())
    made = generator(og, og.Model(config), max_length=10)
    made.append_tokens(np.array([5, 6, 7], np.int32))
    other = generator(*load("ortlm.genai"), max_length=10)
    other.append_tokens(np.array([5, 6, 7], np.int32))
    assert finish(made) == finish(other)


def test_data_that_makes_no_sense(config):
    config.add_model_data("model.onnx", b"nonsense")
    with pytest.raises(RuntimeError, match="cannot load"):
        og.Model(config)
    config.remove_model_data("model.onnx")
    assert og.Model(config).type == "phi3"
    with pytest.raises(RuntimeError, match="no data was given"):
        config.remove_model_data("model.onnx")
    with pytest.raises(RuntimeError, match="without folders"):
        config.add_model_data("../model.onnx", b"")


@pytest.mark.parametrize("open_", [og.Config, og.Model, og.Tokenizer])
def test_folders_that_are_no_models(open_, tmp_path):
    with pytest.raises(RuntimeError, match=r"genai_config\.json is missing"):
        open_(str(tmp_path))


def test_a_damaged_file(tmp_path):
    (Path(tmp_path) / "genai_config.json").write_text('{"model": 3}')
    with pytest.raises(RuntimeError, match="damaged"):
        og.Config(str(tmp_path))


def test_what_is_not_supported(config, model, folder):
    for call in (
        lambda: og.Config.from_package_ep(str(folder), "cuda"),
        model.create_multimodal_processor,
        model.create_streaming_processor,
        lambda: og.MultiModalProcessor(model),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_a_model_runs_on_one_device(config):
    config.append_provider("cuda")
    config.append_provider("webgpu")
    with pytest.raises(
        RuntimeError, match=r"one device, found cuda, webgpu\. Call clear_providers\(\) before"
    ):
        og.Model(config)


def test_devices_of_plugins(config):
    """By type, hardware id and vendor; a provider that is chosen by its name takes none of them."""
    config.set_decoder_provider_options_hardware_device_type("OpenVINO", "NPU")
    config.set_decoder_provider_options_hardware_device_id("OpenVINOExecutionProvider", 7)
    config.set_decoder_provider_options_hardware_vendor_id("openvino", 32902)
    config.clear_decoder_provider_options_hardware_device_id("OpenVINO")
    wanted = {"hardware_device_type": "npu", "hardware_vendor_id": 32902}
    assert config._device() == DeviceRequest("OpenVINO", {}, wanted)
    config.clear_providers()
    assert config._device().filters == {}
    config.set_decoder_provider_options_hardware_device_type("cpu", "GPU")
    with pytest.raises(
        RuntimeError, match="hardware_device_type is for devices of plugins; device cpu is chosen"
    ):
        og.Model(config)
    with pytest.raises(RuntimeError, match="no type of device 'TPU'; there are CPU, GPU and NPU"):
        config.set_decoder_provider_options_hardware_device_type("cpu", "TPU")


def test_the_gpu_of_the_process(config):
    config.append_provider("cuda")
    og.set_current_gpu_device_id(1)
    try:
        assert config._device().name == "cuda:1"
        config.set_provider_option("cuda", "device_id", "0")
        assert config._device() == DeviceRequest("cuda", {"device_id": "0"})
    finally:
        og.set_current_gpu_device_id(0)
