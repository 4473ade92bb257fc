# ruff: noqa: TID251 - graphs that no builder of ours writes
"""An artifact sets no option that reads a file, writes one, loads a library, or starts threads."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

import ortlm
import ortlm.genai
from ortlm.artifact import open_artifact
from ortlm.cli import main
from ortlm.errors import BadArtifact, BadOption, NoDevice
from ortlm.runtime.engine.session import Session

WEIGHTS = "session.model_external_initializers_file_folder_path"
REFUSED = [
    (WEIGHTS, "/etc"),
    ("enable_profiling", True),
    ("enable_profiling", "profile"),
    ("profile_file_prefix", "x"),
    ("optimized_model_filepath", "x"),
    ("intra_op_num_threads", 10**6),
    ("inter_op_num_threads", 10**6),
    ("log_severity_level", "0"),
    ("log_severity_level", 5),
    ("session.load_model_format", "ORT"),
    ("session.intra_op_thread_affinities", "1;2"),
    ("session.custom_ops", "x.so"),
    ("custom_ops_library", "x.so"),
    ("ep.context_file_path", "/tmp/x"),
    ("session.disable_cpu_ep_fallback", "1"),
    ("optimization.disable_specified_optimizers", "/etc/passwd"),
    ("k" * 2_000, "1"),
    ("enable_mem_pattern", "yes"),
    ("enable_cpu_mem_arena", [1]),
    ("graph_optimization_level", 99),
    ("graph_optimization_level", "ORT_ENABLE_EVERYTHING"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
@pytest.mark.parametrize("file", ["ortlm.json", "genai_config.json"])
def test_refused(changed, file, key, value):
    place = "session_options" if file == "ortlm.json" else "model/decoder/session_options"
    folder = changed(file, {f"{place}/{key}": value})
    with pytest.raises(BadArtifact, match=key[:40]) as caught:
        open_artifact(folder)
    assert file in str(caught.value)
    assert len(str(caught.value)) < 1_000
    if file == "genai_config.json":
        with pytest.raises(RuntimeError, match=key[:40]):
            ortlm.genai.Config(str(folder))


@pytest.mark.parametrize(
    "key", ["intra_op_num_threads", "inter_op_num_threads", "log_severity_level", "log_id"]
)
def test_refused_in_a_manifest_only(changed, key):
    with pytest.raises(BadArtifact, match=key):
        open_artifact(changed("ortlm.json", {f"session_options/{key}": 1}))


def test_the_folder_of_weights_stays(changed, tmp_path, capsys):
    """Weights with a harmless location, in a folder that an option moved."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "model.onnx.data").write_bytes(b"x" * 10_000_000)
    folder = changed("ortlm.json", {f"session_options/{WEIGHTS}": str(tmp_path / "secret")})
    (folder / "model.onnx.data").unlink()
    assert main(["generate", str(folder), "fox"]) == 1
    assert f"session_options.{WEIGHTS} is not allowed in an artifact" in capsys.readouterr().err


def test_what_the_official_builder_writes(changed):
    options = {
        "log_id": "onnxruntime-genai",
        "intra_op_num_threads": 4,
        "log_severity_level": 3,
        "enable_profiling": False,
        "custom_ops_library": "",
        "ep.cuda.fpa_intb_gemm": "1",
        "optimization.disable_specified_optimizers": "MatMulNBitsFusion",
        "session.use_device_allocator_for_initializers": "1",
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "enable_mem_pattern": False,
        "provider_options": [
            {"cuda": {"enable_cuda_graph": "0"}},
            {"dml": {"enable_graph_capture": "1"}},
            {"webgpu": {"enableGraphCapture": "0", "validationMode": "basic"}},
            {"NvTensorRtRtx": {"enable_cuda_graph": "1"}},
            {"OpenVINO": None},
            {"QNN": {}},
        ],
    }
    folder = changed("genai_config.json", {"model/decoder/session_options": options})
    manifest = open_artifact(folder).manifest
    assert set(manifest.session_options) == {
        "ep.cuda.fpa_intb_gemm",
        "optimization.disable_specified_optimizers",
        "session.use_device_allocator_for_initializers",
        "graph_optimization_level",
        "enable_mem_pattern",
    }
    assert (manifest.device, manifest.device_options) == ("cuda", {"enable_cuda_graph": "0"})
    with pytest.raises(
        NoDevice, match=r"was built for cuda, and this machine cannot run that: .*--device cpu"
    ):
        ortlm.load(folder, threads=1)
    assert (
        len(ortlm.load(folder, threads=1, device="cpu").generate([5, 6, 7], max_new_tokens=2).token_ids) == 2
    )
    ortlm.genai.Config(str(folder))


def test_options_that_say_how_a_graph_is_to_be_read(changed):
    """Both rotation tables in one, of which only WebGPU's provider knows where the second begins."""
    options = [{"webgpu": {"multiRotaryCacheConcatOffset": "4096", "validationMode": "basic"}}]
    folder = changed("genai_config.json", {"model/decoder/session_options/provider_options": options})
    with pytest.raises(
        BadOption, match=r"option multiRotaryCacheConcatOffset is a part of its graph: on cpu"
    ):
        ortlm.load(folder, device="cpu")
    config = ortlm.genai.Config(str(folder))
    config.clear_providers()
    with pytest.raises(RuntimeError, match="multiRotaryCacheConcatOffset is a part of its graph"):
        ortlm.genai.Model(config)


@pytest.mark.parametrize(
    "options",
    [
        [{"qnn": {"backend_path": "/tmp/x.so"}}],
        [{"OpenVINO": {"cache_dir": "/tmp"}}],
        [{"cuda": {"user_compute_stream": "1"}}],
        [{"cuda": {"enable_cuda_graph": "x"}}],
        [{"cuda": {"gpu_external_alloc": 5}}],
        [{"CUDAExecutionProvider": {"device_filtering_options": {}}}],
        [{"webgpu": {"validationMode": "/x"}}],
        [{"cuda": [1]}],
        ["cuda"],
        {"cuda": {}},
        5,
    ],
)
def test_options_of_providers(changed, options):
    folder = changed("genai_config.json", {"model/decoder/session_options/provider_options": options})
    with pytest.raises(BadArtifact, match="provider_options"):
        open_artifact(folder)
    with pytest.raises(RuntimeError, match="provider_options"):
        ortlm.genai.Model(str(folder))


def test_a_program_decides_about_its_machine(changed):
    config = ortlm.genai.Config(str(changed("genai_config.json", {})))
    wanted = {"intra_op_num_threads": 1, "log_severity_level": 4, "session.intra_op.allow_spinning": "0"}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": wanted}}}))
    model = ortlm.genai.Model(config)
    assert model._handle.lm.session.threads == 1


@pytest.mark.parametrize(
    "options",
    [
        {"intra_op_num_threads": "many"},
        {"intra_op_num_threads": 10**6},
        {"inter_op_num_threads": 10**30},
        {"k" * 2_000: "1"},
        {"log_severity_level": [3]},
        {"graph_optimization_level": 99},
        {"x": {}},
        {"session.intra_op_thread_affinities": "no"},
    ],
)
def test_a_programs_own_options_are_checked(built, options):
    with pytest.raises((BadOption, BadArtifact), match=r"session option|cannot load") as caught:
        Session(built / "model.onnx", options=options)
    assert "\n" not in str(caught.value)


# --- where weights lie ----------------------------------------------------------------------------------


def graph_with(location: str, *, nested: bool = False) -> onnx.ModelProto:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    make = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info
    inner = onnx.helper.make_graph(
        [make("Identity", ["w"], ["i"])], "inner", [], [value("i", 1, [4])], [tensor]
    )
    other = onnx.helper.make_graph(
        [make("Constant", [], ["j"], value_floats=[0.0] * 4)], "other", [], [value("j", 1, [4])]
    )
    true = onnx.numpy_helper.from_array(np.array(True), "c")
    if nested:
        nodes, tensors = [make("If", ["c"], ["y"], then_branch=inner, else_branch=other)], [true]
    else:
        nodes, tensors = [make("Identity", ["w"], ["y"])], [tensor]
    graph = onnx.helper.make_graph(nodes, "g", [], [value("y", 1, [4])], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


OUTSIDE = [
    "../secret",
    "/etc/passwd",
    "link",
    "sub/link",
    "*/_ORT_MEM_ADDR_/*",
    "\\x",
    "C:x",
    "a\\..\\..\\x",
    "pipe",
    ".",
]


@pytest.mark.parametrize("location", OUTSIDE)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("from_bytes", [False, True])
def test_weights_outside(tmp_path, location, nested, from_bytes):
    import os

    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    (folder / "link").symlink_to("../secret")
    (folder / "sub" / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    raw = graph_with(location, nested=nested).SerializeToString()
    (folder / "m.onnx").write_bytes(raw)
    with pytest.raises(BadArtifact, match=r"lies outside|address in memory|not a regular file"):
        Session(folder / "m.onnx", model=raw if from_bytes else None, threads=1)


def test_weights_inside(tmp_path):
    raw = graph_with("weights.bin").SerializeToString()
    (tmp_path / "m.onnx").write_bytes(raw)
    (tmp_path / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    for model in (None, raw):
        assert list(Session(tmp_path / "m.onnx", model=model, threads=1).outputs) == ["y"]


def test_the_hubs_cache(tmp_path):
    """A snapshot's files are links to blobs of the same model; to those of another one they are not."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "cpu"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "aa").write_bytes(graph_with("w.bin").SerializeToString())
    (blobs / "bb").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (snapshot / "m.onnx").symlink_to(blobs / "aa")
    (snapshot / "w.bin").symlink_to(blobs / "bb")
    assert list(Session(snapshot / "m.onnx", threads=1).outputs) == ["y"]
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (blobs / "bb").rename(other / "bb")
    (snapshot / "w.bin").unlink()
    (snapshot / "w.bin").symlink_to(other / "bb")
    with pytest.raises(BadArtifact, match="lies outside"):
        Session(snapshot / "m.onnx", threads=1)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "generation_config.json", "ortlm.json"]
)
def test_links_of_other_files(copy, tmp_path, name):
    (copy / name).rename(tmp_path / "elsewhere") if (copy / name).exists() else (
        tmp_path / "elsewhere"
    ).touch()
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadArtifact, match="lies outside"):
        open_artifact(copy)


def test_files_given_by_a_program_bring_no_links(copy, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (copy / "notes").symlink_to(tmp_path / "secret")
    config = ortlm.genai.Config(str(copy))
    config.add_model_data("extra", b"x")
    with pytest.raises(RuntimeError, match="lies outside"):
        ortlm.genai.Model(config)
