"""Tensors, files, adapters, logs and the process around it all."""

import ctypes

import numpy as np
import onnxruntime
import pytest

import ortlm.genai as og
from tests.genai.conftest import finish, generator


@pytest.fixture
def lines():
    """Lines that are logged meanwhile."""
    found = []
    og.set_log_callback(found.append)
    yield found
    og.set_log_callback(None)
    og.set_log_options(
        enabled=False, generate_next_token=False, append_next_tokens=False, hit_eos=False, ansi_tags=True,
        hit_max_length=False, model_logits=False, model_input_values=False, model_output_shapes=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["float32", "float16", "int32", "int64", "uint8", "bool"])
def test_tensors_are_copies(name):
    array = np.ones((2, 3), name)
    tensor = og.Tensor(array)
    array[...] = 0
    tensor.as_numpy()[...] = 0
    assert tensor.type() is og.ElementType[name]
    assert tensor.shape() == [2, 3]
    assert tensor.as_numpy().all()
    assert tensor.as_numpy().dtype == name


def test_data_of_a_tensor_is_its_address():
    tensor = og.Tensor(np.array([3, 4], np.int32))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    found = ctypes.cast(pointer(tensor.data(), None), ctypes.POINTER(ctypes.c_int32))
    assert found[:2] == [3, 4]


def test_tensors_hold_numbers():
    with pytest.raises(RuntimeError, match="cannot hold"):
        og.Tensor(np.array(["text"]))


def test_tensors_by_name():
    tensors = og.NamedTensors()
    tensors["a"] = np.zeros(2, np.int64)
    tensors["b"] = og.Tensor(np.ones(1))
    assert len(tensors) == 2
    assert "a" in tensors
    assert tensors.keys() == ["a", "b"]
    assert tensors["a"].type() is og.ElementType.int64
    del tensors["a"]
    del tensors["a"]
    with pytest.raises(RuntimeError, match="no tensor 'a'; there is b"):
        _ = tensors["a"]


@pytest.mark.parametrize("kind", [og.Images, og.Audios])
def test_files(kind, tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    assert kind.open(str(tmp_path / "one")).contents == kind.open_bytes(b"1").contents == [b"1"]
    for call in (kind.open, lambda: kind.open(str(tmp_path / "two"))):
        with pytest.raises(RuntimeError):
            call()


def test_providers_are_those_that_are_there():
    known = {
        "CUDA": og.is_cuda_available(),
        "Dml": og.is_dml_available(),
        "WebGpu": og.is_webgpu_available(),
        "QNN": og.is_qnn_available(),
        "OpenVINO": og.is_openvino_available(),
    }
    there = onnxruntime.get_available_providers()
    assert known == {name: f"{name}ExecutionProvider" in there for name in known}


def test_the_process():
    og.set_current_gpu_device_id(0)
    assert og.get_current_gpu_device_id() == 0
    og.enable_telemetry_events()
    og.disable_telemetry_events()
    for call in (
        lambda: og.set_current_gpu_device_id(-1),
        lambda: og.register_execution_provider_library("Nothing", "/nothing.so"),
        lambda: og.unregister_execution_provider_library("Nothing"),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_what_is_left_out_says_so():
    with pytest.raises(AttributeError, match="generate_batch"):
        _ = og.Engine
    assert all(hasattr(og, name) for name in og.__all__)


def test_logs_tell_what_happens(model, lines):
    og.set_log_options(
        enabled=True, ansi_tags=False, generate_next_token=True, append_next_tokens=True, hit_eos=True,
        hit_max_length=True, model_logits=True, model_input_values=True, model_output_shapes=True,
    )  # fmt: skip
    made = generator(og, model, max_length=5)
    made.append_tokens([5, 6, 7])
    finish(made)
    text = "".join(lines)
    assert "  append_next_tokens   5 6 7\n" in text
    assert "  model_input_values   input_ids [ 1 3 ] int64 [5 6 7]\n" in text
    assert "do_sample: 0 top_k: 50 top_p: 1 temperature: 1 sequence length: 3\n" in text
    assert "  model_output_shapes   logits [ 1 1 2048 ] float32\n" in text
    assert "StdDev" in text
    assert "  hit_max_length   5\n" in text


def test_logs_to_a_file_and_to_stderr(model, lines, tmp_path, capsys):
    path = tmp_path / "log"
    og.set_log_options(enabled=True, append_next_tokens=True, filename=str(path))
    generator(og, model).append_tokens([5])
    assert "append_next_tokens\x1b[0m   5\n" in path.read_text()
    og.set_log_options(filename="")
    generator(og, model).append_tokens([6])
    assert "6\n" in capsys.readouterr().err
    assert not lines


@pytest.mark.parametrize(
    "options",
    [{"enable": True}, {"enabled": "yes"}, {"enabled": 1}, {"filename": "/nowhere/log"}, {"filename": 3}],
)
def test_log_options_that_are_refused(options, lines):
    with pytest.raises(RuntimeError):
        og.set_log_options(**options)


@pytest.fixture
def adapters(model, monkeypatch):
    """Adapters over a model that takes any file."""
    loaded = {}
    kind = type(model._handle.lm)
    monkeypatch.setattr(
        kind, "load_adapter", lambda _, name, path: loaded.update({name: path}), raising=False
    )
    monkeypatch.setattr(kind, "unload_adapter", lambda _, name: loaded.pop(name), raising=False)
    found = og.Adapters(model)
    found.loaded = loaded
    return found


def test_adapters_have_names_of_their_own(model, adapters):
    adapters.load("a.onnx_adapter", "french")
    og.Adapters(model).load("b.onnx_adapter", "french")
    assert len(adapters.loaded) == 2
    with pytest.raises(RuntimeError, match="already"):
        adapters.load("a.onnx_adapter", "french")
    adapters.unload("french")
    assert list(adapters.loaded.values()) == ["b.onnx_adapter"]
    with pytest.raises(RuntimeError, match="no adapter 'french'; none is loaded"):
        adapters.unload("french")


def test_an_adapter_in_use_stays(model, adapters):
    adapters.load("a.onnx_adapter", "french")
    user = generator(og, model)
    inner = adapters._use("french", model, user)
    assert adapters.loaded[inner] == "a.onnx_adapter"
    with pytest.raises(RuntimeError, match="in use"):
        adapters.unload("french")
    del user
    adapters.unload("french")


def test_an_adapter_that_is_not_there(model, adapters):
    with pytest.raises(RuntimeError, match="none is loaded"):
        generator(og, model).set_active_adapter(adapters, "french")
