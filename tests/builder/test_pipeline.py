"""The artifact: what is in it, that it appears whole or not at all, and that every target's graph holds."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import ortlm
from ortlm.builder import output_dir
from ortlm.builder.estimate import measure_seconds
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.errors import BadCheckpoint, BadOption, NotEnoughSpace
from ortlm.runtime.text.chat_template import ChatTemplate
from ortlm.target import TARGETS
from tests.architectures import oracle

EVERY = [(t.name, p) for t in TARGETS.values() for p in t.precisions]
SHAPES = ("phi3", "phi4-mini", "phi3-longrope", "phi-2", "gemma2", "qwen3", "olmo2")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("target", "precision"), EVERY)
@pytest.mark.parametrize("name", SHAPES)
def test_every_target(name: str, target: str, precision: str, saved: Any, tmp_path: Path) -> None:
    """Each graph passes the ONNX checker with shape inference; what the CPU can run of it, it runs."""
    if name == "gemma2" and "softcap" in TARGETS[target].attention_ignores:
        pytest.skip("caps scores, which attention there ignores")
    built = ortlm.build(saved(name).folder, tmp_path / "out", precision=precision, target=target)
    path = built.graph_path()
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    known = {v.name for v in (*inferred.graph.value_info, *inferred.graph.output)}
    assert all(out in known for node in model.graph.node for out in node.output if out)
    for value in (*model.graph.input, *model.graph.output):
        if "past" in value.name or "present" in value.name:
            dims = value.type.tensor_type.shape.dim
            assert dims[1].dim_value > 0
            assert dims[3].dim_value > 0
    if precision == "bf16":
        return  # the CPU has no bf16 kernels
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tokens = oracle.random_tokens(40)
    feed: dict[str, Any] = {
        "input_ids": np.array([tokens]),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
        "num_logits_to_keep": np.array(0),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            kind = np.float16 if "16" in value.type else np.float32
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
        if value.name == "position_ids":
            feed["position_ids"] = np.arange(len(tokens))[None]
    got = session.run(["logits"], feed)[0][0].astype(np.float32)
    error = oracle.relative_error(got, oracle.prompt_logits(saved(name).model, tokens))
    assert error < {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.12, "int4": 0.9}[precision]


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "gemma2"])
@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
def test_webgpu_without_fp16(name: str, precision: str, saved: Any, tmp_path: Path) -> None:
    """The same weights as with fp16 activations, and nothing of fp16 in the graph, which any CPU runs."""
    options = BuildOptions(fp32_activations=True)
    out = ortlm.build(
        saved(name).folder, tmp_path / "out", precision=precision, target="webgpu", options=options
    )
    half = onnx.TensorProto.FLOAT16
    model = onnx.load(out.graph_path(), load_external_data=False)
    onnx.checker.check_model(out.graph_path(), full_check=True)
    assert half not in {initializer.data_type for initializer in model.graph.initializer}
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    assert half not in {value.type.tensor_type.elem_type for value in values}
    assert out.manifest.info["activations"] == out.manifest.info["kv_cache"] == "fp32"
    provider = json.loads((out.path / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert provider["provider_options"] == [{"webgpu": {}}]
    tokens = oracle.random_tokens(40)
    got, want = (
        ortlm.load(out.path, threads=1, device="cpu").logits(tokens),
        oracle.prompt_logits(saved(name).model, tokens),
    )
    assert oracle.relative_error(got, want) < {"fp32": 1e-4, "int8": 0.12, "int4": 0.9}[precision]


def test_max_length(saved: Any, tmp_path: Path) -> None:
    """What a long model allows by default, and what is asked for; nothing else changes."""
    folder = tmp_path / "long"
    shutil.copytree(saved("llama").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131072}))
    found = {}
    for length in (None, 1, 4097, 131072):
        out = ortlm.build(folder, tmp_path / str(length), options=BuildOptions(max_length=length))
        found[length] = json.loads((out.path / "genai_config.json").read_text())
        assert found[length]["model"]["context_length"] == out.manifest.context_tokens == 131072
    assert [found[n]["search"].pop("max_length") for n in found] == [4096, 1, 4097, 131072]
    assert found[None] == found[131072]
    with pytest.raises(
        BadOption, match=r"max_length must be 1 to 131,072, the model's context.* got 131,073"
    ):
        ortlm.build(folder, tmp_path / "out", options=BuildOptions(max_length=131073))


def test_contents(tiny: Path, tmp_path: Path) -> None:
    built = ortlm.build(tiny, tmp_path / "out")
    names = {p.name for p in built.path.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "ortlm.json", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    config = json.loads((tiny / "config.json").read_text())
    defaults = json.loads((tiny / "generation_config.json").read_text())
    stop = (
        defaults["eos_token_id"] if isinstance(defaults["eos_token_id"], list) else [defaults["eos_token_id"]]
    )
    assert set(stop) | {config["eos_token_id"]} <= set(built.manifest.stop_token_ids)
    card = (built.path / "README.md").read_text()
    for word in ("license:", "int4", "block 32", "Context", "bits per weight".capitalize()):
        assert word in card
    genai = json.loads((built.path / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == list(built.manifest.stop_token_ids)
    hashes = built.manifest.info["files"]
    assert hashes["model.onnx.data"]["bytes"] == (built.path / "model.onnx.data").stat().st_size
    assert str(tiny) not in (built.path / "ortlm.json").read_text()


def test_same_input_same_bytes(tiny: Path, tmp_path: Path) -> None:
    one = ortlm.build(tiny, tmp_path / "one", threads=1)
    two = ortlm.build(tiny, tmp_path / "two", threads=3)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def inputs_of_attention(path: Path) -> set[int]:
    """Return how many inputs the attention operators of a graph have."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {len(node.input) for node in nodes if node.op_type == "GroupQueryAttention"}


@pytest.mark.parametrize(
    ("target", "more", "graphs"),
    [
        ("cpu", None, {"model.onnx", "model_ragged.onnx"}),
        ("cpu", True, {"model.onnx", "model_ragged.onnx"}),
        ("cpu", False, {"model.onnx"}),
        ("cuda", None, {"model.onnx", "model_ragged.onnx"}),
        ("dml", None, {"model.onnx"}),
        ("webgpu", None, {"model.onnx"}),
        ("mobile", False, {"model.onnx"}),
    ],
)
def test_graphs_of_a_folder(
    target: str, more: bool | None, graphs: set[str], tiny: Path, tmp_path: Path
) -> None:
    """The graph that everything loads, and next to it the one with lengths per row; the weights lie there once."""
    out = ortlm.build(tiny, tmp_path / "out", target=target, options=BuildOptions(ragged_append=more)).path
    assert {path.name for path in out.glob("*.onnx")} == graphs
    assert [path.name for path in out.glob("*.data")] == ["model.onnx.data"]
    assert set(json.loads((out / "ortlm.json").read_text())["info"]["files"]) >= graphs
    assert json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "model.onnx"
    assert max(inputs_of_attention(out / "model.onnx")) < 17
    if len(graphs) > 1:
        assert inputs_of_attention(out / "model_ragged.onnx") == {17}
        onnx.checker.check_model(out / "model_ragged.onnx", full_check=True)


def test_no_lengths_where_there_is_no_kernel(tiny: Path, tmp_path: Path) -> None:
    for target in ("dml", "webgpu", "mobile"):
        with pytest.raises(BadOption, match=rf"ragged_append does not apply: attention on {target}"):
            ortlm.build(tiny, tmp_path / "out", target=target, options=BuildOptions(ragged_append=True))


@pytest.mark.parametrize("target", list(TARGETS))
def test_names_of_dimensions(target: str, tiny: Path, tmp_path: Path) -> None:
    """Other programs find these by name."""
    out = ortlm.build(tiny, tmp_path / "out", target=target).path
    for path in out.glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        given = {initializer.name for initializer in graph.initializer}
        found = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
            if value.name not in given
        }
        assert found.pop("input_ids") == ["batch_size", "sequence_length"]
        assert found.pop("attention_mask") == ["batch_size", "total_sequence_length"]
        assert found.pop("logits") == ["batch_size", 1, 2048]
        assert found.pop("position_ids", ["batch_size", "sequence_length"]) == [
            "batch_size",
            "sequence_length",
        ]
        for name, shape in found.items():
            length = "past_sequence_length" if name.startswith("past") else "total_sequence_length"
            assert shape == ["batch_size", shape[1], length, shape[3]]


@pytest.mark.parametrize("installed", ["1.23.0", "1.31.1", "1.99.0"])
def test_same_bytes_whatever_is_installed(
    installed: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is for every ONNX Runtime, so the one where it is built does not matter."""
    one = ortlm.build(tiny, tmp_path / "one").path
    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: installed if name == "onnxruntime" else version(name)
    )
    monkeypatch.setattr(ort, "__version__", installed)
    two = ortlm.build(tiny, tmp_path / "two").path
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        if path.name != "ortlm.json":
            assert path.read_bytes() == (two / path.name).read_bytes()


def test_tied_embeddings_are_stored_once(saved: Any, tmp_path: Path) -> None:
    """Head and embeddings of a tied model name the same bytes."""
    built = ortlm.build(saved("qwen2-tied").folder, tmp_path / "out")
    model = onnx.load(built.graph_path(), load_external_data=False)
    places = {
        i.name: {e.key: e.value for e in i.external_data} for i in model.graph.initializer if i.external_data
    }
    assert places["embed_tokens.codes"] == places["embed_tokens.rows"]


@pytest.mark.parametrize(
    ("family", "options", "needs"),
    [
        ("phi-2", {"embed_bits": 4, "block_size": 32, "symmetric": False}, "1.27"),  # five blocks
        ("phi-2", {"embed_bits": 4, "block_size": 16, "symmetric": False}, "1.23"),  # ten
        ("phi-2", {"embed_bits": 4, "block_size": 32, "symmetric": True}, "1.23"),
        ("phi-2", {"embed_bits": 8, "block_size": 32, "symmetric": False}, "1.23"),
        ("phi-2", {"embed_bits": 2, "block_size": 16, "symmetric": True}, "1.27"),
        (
            "qwen2-tied",
            {"embed_bits": 4, "head_bits": 0, "block_size": 64, "symmetric": False},
            "1.27",
        ),  # one
        ("qwen2-tied", {"embed_bits": 0, "head_bits": 4, "symmetric": False}, "1.24"),
    ],
)
def test_embeddings_that_older_runtimes_look_up_wrongly(
    family: str, options: dict[str, Any], needs: str, saved: Any, tmp_path: Path
) -> None:
    ortlm.build(saved(family).folder, tmp_path / "out", options=BuildOptions(**options))
    manifest = json.loads((tmp_path / "out" / "ortlm.json").read_text())
    assert manifest["graphs"]["decoder"]["onnxruntime"] == needs


@pytest.mark.parametrize("widths", [(0, 8), (4, 0), (0, 0), (8, 8)], ids=str)
def test_tied_widths(widths: tuple[int, int], saved: Any, tmp_path: Path) -> None:
    """Embeddings and head of a tied model may be float or quantized, each for itself."""
    row, (embed, head) = saved("qwen2-tied"), widths
    options = BuildOptions(embed_bits=embed, head_bits=head)
    ortlm.build(row.folder, tmp_path / "out", options=options)
    tokens = oracle.random_tokens(20)
    got = ortlm.load(tmp_path / "out", threads=1).logits(tokens)
    assert oracle.relative_error(got, oracle.prompt_logits(row.model, tokens)) < 0.8


def test_options_change_the_graph(saved: Any, tmp_path: Path) -> None:
    folder = saved("llama").folder
    options = BuildOptions(
        layers=1, all_logits=True, filename="m.onnx", excluded_nodes=("/model/layers.0/attn/o_proj/MatMul",)
    )
    built = ortlm.build(folder, tmp_path / "out", options=options)
    model = onnx.load(built.path / "m.onnx", load_external_data=False)
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("GroupQueryAttention") == 1
    assert kinds.count("MatMul") == 1
    logits = ortlm.load(tmp_path / "out", threads=1).logits([1, 2, 3])
    assert logits.shape == (3, 288)
    with pytest.raises(BadOption, match=r"'/model/layers.9/x', which is not in the graph"):
        ortlm.build(folder, tmp_path / "no", options=BuildOptions(excluded_nodes=("/model/layers.9/x",)))
    with pytest.raises(BadOption, match="num_hidden_layers must be 1 to 2"):
        ortlm.build(folder, tmp_path / "no", options=BuildOptions(layers=3))
    with pytest.raises(BadOption, match="plain name"):
        ortlm.build(folder, tmp_path / "no", options=BuildOptions(filename="../m.onnx"))


def test_config_only(tiny: Path, tmp_path: Path) -> None:
    ortlm.build(tiny, tmp_path / "out", options=BuildOptions(config_only=True))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"genai_config.json", "ortlm.json", "tokenizer.json"} <= names
    assert not {"model.onnx", "model.onnx.data"} & names
    ortlm.build(tiny, tmp_path / "whole")
    with pytest.raises(BadOption, match="without weights"):
        ortlm.build(tiny, tmp_path / "whole", force=True, options=BuildOptions(config_only=True))


def test_hidden_states(saved: Any, tmp_path: Path) -> None:
    row = saved("llama")
    built = ortlm.build(
        row.folder, tmp_path / "out", precision="fp32", options=BuildOptions(hidden_states=True)
    )
    session = ort.InferenceSession(built.graph_path(), providers=["CPUExecutionProvider"])
    tokens = oracle.random_tokens(9)
    feed: dict[str, Any] = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, 9), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    hidden, logits = session.run(["hidden_states", "logits"], feed)
    assert hidden.shape == (1, 9, 64)
    want = oracle.prompt_logits(row.model, tokens)
    assert oracle.relative_error(logits[0, 0], want[-1]) < 1e-4
    head = row.model.get_output_embeddings().weight.detach().numpy()
    assert oracle.relative_error(hidden[0] @ head.T, want) < 1e-4


# --- whole or not at all ------------------------------------------------------------------------------------


def test_existing_artifact(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ortlm.build(tiny, out)
    before = contents(out)
    with pytest.raises(BadOption, match=r"holds an artifact already. Add --force"):
        ortlm.build(tiny, out, precision="int8")
    assert contents(out) == before
    ortlm.build(tiny, out, precision="int8", force=True)
    assert contents(out)["model.onnx.data"] != before["model.onnx.data"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_other_files_are_never_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear")
    with pytest.raises(BadOption, match="other files"):
        ortlm.build(tiny, tmp_path / "out", force=True)
    with pytest.raises(BadOption, match="is not a folder"):
        ortlm.build(tiny, tmp_path / "out" / "diary.txt")
    assert (tmp_path / "out" / "diary.txt").read_text() == "dear"


def test_unwritable_output(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadOption, match="cannot be created"):
        ortlm.build(tiny, tmp_path / "file" / "out")


def test_failure_keeps_the_old_artifact(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "out"
    ortlm.build(tiny, out)
    before = contents(out)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for target in (out, tmp_path / "new" / "out"):
        with pytest.raises(NotEnoughSpace, match="became full"):
            ortlm.build(tiny, target, force=True)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_space_is_checked_first(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NotEnoughSpace, match=r"needs 3\.\d MB, but .* has 1\.0 kB free"):
        ortlm.build(tiny, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_dead_builds_are_swept(tiny: Path, tmp_path: Path) -> None:
    """What a killed build left behind goes with the next one; a living build's folder stays."""
    (tmp_path / ".out.partial-dead0000").mkdir()
    with output_dir.unfinished(tmp_path / "out") as living:
        ortlm.build(tiny, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == [living.name, "out"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_interrupted(how: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    """Half way through writing, a signal leaves nothing, and the exit code says which it was."""
    out = tmp_path / "out"
    code = (
        "import signal, sys, time\n"
        # What started the tests may ignore it, as nohup does.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from ortlm.weights import writer\n"
        "from ortlm.cli import main\n"
        "slow = writer._write_rows\n"
        "def late(*a):\n    time.sleep(2); slow(*a)\n"
        "writer._write_rows = late\n"
        f"arguments = ['-i', {str(tiny)!r}, '-o', {str(out)!r}, '--threads', '1', '--recipe', 'fast']\n"
        "sys.exit(main(['build', *arguments]))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/model.onnx.data")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(how)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 128 + how
    assert said.splitlines()[-1] == "interrupted: nothing was left behind."
    assert not list(tmp_path.iterdir())


def test_outline_matches(tiny: Path, tmp_path: Path) -> None:
    prepared = prepare(BuildRequest(tiny))
    assert not list(tmp_path.iterdir())
    built = ortlm.build(tiny, tmp_path / "out")
    size = sum(p.stat().st_size for p in built.path.iterdir())
    assert abs(size / prepared.outline.output_bytes - 1) < 0.15
    assert measure_seconds(prepared.outline, prepared.emitted.builder.plan) > 0


# --- nothing of the user's is taken away -------------------------------------------------------------------


def test_checkpoint_is_never_replaced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "art"
    ortlm.build(tiny, out)
    source = Path(shutil.copytree(tiny, out / "src"))
    for output in (out, source):
        with pytest.raises(BadOption, match="holds the checkpoint"):
            ortlm.build(source, output, force=True)
    assert (source / "model.safetensors").is_file()


def test_files_that_no_build_wrote_are_never_deleted(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ortlm.build(tiny, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadOption, match=r"'notes.txt', which no build wrote"):
        ortlm.build(tiny, out, force=True)
    official = tmp_path / "official"
    official.mkdir()
    (official / "genai_config.json").write_text("{}")
    with pytest.raises(BadOption, match="another tool built"):
        ortlm.build(tiny, official, force=True)


def test_links_and_devices_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "broken", "fifo"):
        with pytest.raises(BadOption, match="is not a folder"):
            ortlm.build(tiny, tmp_path / name, force=True)
    with pytest.raises(BadOption, match="disk is mounted"):
        ortlm.build(tiny, "/proc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "fifo", "link", "real"]


def test_artifact_that_was_moved_aside_comes_back(tiny: Path, tmp_path: Path) -> None:
    """A build that was killed between its two renames leaves the old artifact under a hidden name."""
    ortlm.build(tiny, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-1234abcd")
    with pytest.raises(BadOption, match="holds an artifact"):
        ortlm.build(tiny, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- odd checkpoints ----------------------------------------------------------------------------------------


def odd(tiny: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    """Copy the small model with changed values in the JSON file ``name``."""
    folder = Path(shutil.copytree(tiny, tmp_path / "odd"))
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("generation_config.json", {"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ("generation_config.json", {"top_k": True}, "top_k is True"),
        ("generation_config.json", {"top_k": 2**40}, "top_k is"),
        ("generation_config.json", {"temperature": float("nan")}, "holds nan, which is no finite"),
        ("generation_config.json", {"do_sample": "yes"}, "expected true or false"),
        ("generation_config.json", {"eos_token_id": [0, "x"]}, "\"eos_token_id\" has 'x'"),
        ("config.json", {"eos_token_id": True}, '"eos_token_id" has True'),
        ("config.json", {"eos_token_id": 99999}, '"eos_token_id" has 99999, expected numbers from 0 to 2047'),
        ("tokenizer.json", {"model": None}, "is no tokenizer"),
    ],
)
def test_bad_metadata(name: str, changes: dict[str, Any], message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=message):
        prepare(BuildRequest(odd(tiny, tmp_path, name, **changes)))


@pytest.mark.parametrize(
    "front", ["license: : :", "license: !!python/object:os.system x", "tags: 5", "- a\n- b"]
)
def test_odd_model_cards_do_not_matter(front: str, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "odd"))
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    prepare(BuildRequest(folder))


def test_odd_tokens_do_not_matter(tiny: Path, tmp_path: Path) -> None:
    folder = odd(tiny, tmp_path, "tokenizer_config.json", eos_token=["a"])
    assert prepare(BuildRequest(folder)).manifest.stop_token_ids


@pytest.mark.parametrize(
    "template", [None, [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]]
)
def test_chat_templates_that_the_official_runtime_refuses(template: Any, tiny: Path, tmp_path: Path) -> None:
    folder = odd(tiny, tmp_path, "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").unlink()
    ortlm.build(folder, tmp_path / "out")
    og = pytest.importorskip("onnxruntime_genai")
    assert og.Tokenizer(og.Model(str(tmp_path / "out"))).encode("a").size
    found = ortlm.load(tmp_path / "out", threads=1).chat_template
    assert (found.templates if found else None) == ({"default": "A", "tool_use": "B"} if template else None)


def test_named_chat_templates_are_taken_along(tiny: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = Path(shutil.copytree(tiny, tmp_path / "odd"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("TOOLS {{ tools[0].function.name }}")
    (folder / "additional_chat_templates/rag.jinja").write_text("RAG")
    built = ortlm.build(folder, tmp_path / "out", precision="fp32")
    assert "additional_chat_templates/tool_use.jinja" in built.manifest.info["files"]
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = ChatTemplate.open(tmp_path / "out", reference.special_tokens_map)
    assert ours is not None
    assert ours.templates == reference.chat_template
    talk, tools = [{"role": "user", "content": "x"}], [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        assert ours.render(talk, tools=given, add_generation_prompt=False) == reference.apply_chat_template(
            talk, tools=given, tokenize=False
        )
    # Built again, over itself.
    ortlm.build(folder, tmp_path / "out", precision="fp32", force=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"chat_template": [{"name": ["x"], "template": "x"}]}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("chat_template.json", '{"chat_template": [1]}'),
        ("chat_template.jinja", b"\xff\xfe"),
        ("additional_chat_templates/x.jinja", b"\xff\xfe"),
        ("additional_chat_templates/x.jinja", None),
        ("additional_chat_templates/x.jinja", b"x" * 600_000),
    ],
)
def test_what_is_no_chat_template_is_told(name: str, content: Any, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "odd"))
    if name.endswith("json"):
        (folder / "chat_template.jinja").unlink()
    if name == "chat_template.json":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BadCheckpoint, match=re.escape(path.name)):
        prepare(BuildRequest(folder))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_checkpoint_with_a_head_of_its_own(equal: bool, saved: Any, tmp_path: Path) -> None:
    """The configuration says tied, the weights say otherwise: transformers goes by the weights, and so do we."""
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(saved("qwen2-tied").folder, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    if not equal:
        head += np.random.default_rng(0).standard_normal(head.shape).astype(np.float32)
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ortlm.build(folder, tmp_path / "out", precision="fp32")
    tokens = oracle.random_tokens(20)
    got = ortlm.load(tmp_path / "out", threads=1).logits(tokens)
    assert oracle.relative_error(got, oracle.prompt_logits(model, tokens)) < 1e-4
