"""The artifact: what is in it, that it appears whole or not at all, and that every target's graph holds."""

from __future__ import annotations

import errno
import json
import os
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
from ortlm import building
from ortlm.errors import BadOption, NotEnoughSpace
from ortlm.options import BuildOptions
from ortlm.outline import measure_seconds
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
    for word in ("license:", "int4", "block 128", "Context", "bits per weight".capitalize()):
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


def test_tied_embeddings_are_stored_once(saved: Any, tmp_path: Path) -> None:
    """Head and embeddings of a tied model name the same bytes."""
    built = ortlm.build(saved("qwen2-tied").folder, tmp_path / "out")
    model = onnx.load(built.graph_path(), load_external_data=False)
    places = {
        i.name: {e.key: e.value for e in i.external_data} for i in model.graph.initializer if i.external_data
    }
    assert places["embed_tokens.codes"] == places["embed_tokens.rows"]


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
    with pytest.raises(BadOption, match="is a file"):
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
    with pytest.raises(NotEnoughSpace, match=r"needs 2\.\d MB, but .* has 1\.0 kB free"):
        ortlm.build(tiny, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_dead_builds_are_swept(tiny: Path, tmp_path: Path) -> None:
    """What a killed build left behind goes with the next one; a living build's folder stays."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    (tmp_path / f".out.partial-{child.pid}").mkdir()
    (tmp_path / f".out.partial-{os.getppid()}").mkdir()
    ortlm.build(tiny, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".out.partial-{os.getppid()}", "out"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(how: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    """Half way through writing, Ctrl-C leaves nothing and says 130."""
    out = tmp_path / "out"
    code = (
        "import sys, time\n"
        "from ortlm import write\n"
        "from ortlm.cli import main\n"
        "slow = write._write_rows\n"
        "def late(*a):\n    time.sleep(0.2); slow(*a)\n"
        "write._write_rows = late\n"
        f"sys.exit(main(['build', '-i', {str(tiny)!r}, '-o', {str(out)!r}, '--threads', '1']))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/model.onnx.data")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(how)
    assert child.wait(60) == 130
    assert not list(tmp_path.iterdir())


def test_outline_matches(tiny: Path, tmp_path: Path) -> None:
    prepared = building.prepare(tiny)
    assert not list(tmp_path.iterdir())
    built = ortlm.build(tiny, tmp_path / "out")
    size = sum(p.stat().st_size for p in built.path.iterdir())
    assert abs(size / prepared.outline.output_bytes - 1) < 0.15
    assert measure_seconds(prepared.outline, prepared.emitted.builder.plan) > 0
