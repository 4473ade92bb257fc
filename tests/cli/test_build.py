"""``ortlm build`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ortlm.cli import main
from tests import lora


def run(*args: object) -> int:
    return main(["build", *map(str, args)])


def test_official_flags(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", tiny, "-o", tmp_path / "out", "-p", "int4", "-e", "cpu", "-c", tmp_path / "c") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in ("checkpoint size", "model size", "bits per weight", "time", "peak memory"):
        assert word in captured.err


def test_module_of_the_official_name(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ortlm.models.builder", "-i", tiny, "-o", tmp_path / "out"]
    subprocess.run(
        [
            *command,
            "-p",
            "int4",
            "-e",
            "cpu",
            "--extra_options",
            "int4_block_size=32",
            "int4_accuracy_level=4",
            "algo_config=rtn",
        ],
        check=True,
        capture_output=True,
    )
    info = json.loads((tmp_path / "out" / "ortlm.json").read_text())["info"]
    assert "block 32" in info["recipe"]


def test_dry_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-i", tiny, "-o", tmp_path / "out", "--dry-run") == 0
    out = capsys.readouterr().out
    for word in ("parameters", "bits per weight", "peak memory", "time", "size"):
        assert word in out
    assert run("-i", tiny, "-o", tmp_path / "out", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert found["parameters"] > 1e6
    assert found["output_bytes"] > 0
    assert found["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_experts(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A calibrated build of a mixture says which experts it could not calibrate."""
    ids = np.random.default_rng(0).integers(5, 280, 64)
    np.save(tmp_path / "ids.npy", ids)
    given = ("-i", saved("qwen3-moe").folder, "-o", tmp_path / "out", "--recipe", "balanced", "--no-check")
    given += ("--calibration", tmp_path / "ids.npy", "--calibration-tokens", 32)
    assert run(*given, "--dry-run") == 0
    assert "gptq" in capsys.readouterr().out
    assert run(*given) == 0
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "of 48 matrices calibrated" in text
    assert "too few tokens chose them (ortlm.json lists which)" in text
    assert run(*given, "--force", "--json") == 0
    found = json.loads(capsys.readouterr().out)["experts"]
    assert found["calibrated"] + sum(map(len, found["rounded"].values())) == 48


def test_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-i", tiny, "-o", tmp_path / "out", "--json", "-p", "int8") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["output_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert captured.err == ""


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-p", "fp16"), 2, r"Nearest: -p fp32"),
        (("-p", "INT4"), 2, r"Did you mean: int4"),
        (("-p", "int3"), 2, r"there is no precision 'int3'"),
        (("-e", "cdua"), 2, r"Did you mean: cuda"),
        (("-e", "dml", "-p", "int8"), 2, r"Nearest: -p int4"),
        (("-e", "cuda", "-p", "fp32"), 2, r"Nearest: -p fp16"),
        (("--extra_options", "int4_blok_size=32"), 2, r"Did you mean: int4_block_size"),
        (("--extra_options", "block_size=48"), 2, r"Nearest: 32"),
        (("--threads", "0"), 2, r"at least 1"),
        (("--adapter", "lora"), 2, r"takes NAME=PATH, for example french=./french-lora; got 'lora'"),
        (("--adapter", "a/b=lora"), 2, r"letters, digits, .* got 'a/b'"),
        (("--adapter", "a=x", "--adapter", "a=y"), 2, r"gives 'a' twice"),
        (("--adapter", "a=nothing"), 1, r"nothing is not a folder"),
        (("--merge-adapter", "nothing"), 1, r"nothing is not a folder"),
        (("--extra_options", "adapter_path=x"), 2, r"is --merge-adapter PATH here"),
        (("--max-length", "0"), 2, r"max_length must be 1 to 512, the model's context in tokens; got 0"),
        (("--max-length", "-1"), 2, r"max_length must be 1 to 512"),
        (("--max-length", "513"), 2, r"max_length must be 1 to 512.* got 513"),
        (("--max-length", "513", "--dry-run"), 2, r"max_length must be 1 to 512"),
        (
            ("--extra_options", "use_webgpu_fp32=true"),
            2,
            r"cpu computes in fp32 with -p int4.* for -e webgpu",
        ),
        (("-e", "cuda", "--extra_options", "use_webgpu_fp32=1"), 2, r"cuda computes in fp16.* -e webgpu"),
        (
            ("-e", "webgpu", "-p", "fp16", "--extra_options", "use_webgpu_fp32=true"),
            2,
            r"use_webgpu_fp32 and -p fp16 contradict.* Nearest: -p fp32 -e webgpu",
        ),
        (("-e", "webgpu", "--extra_options", "use_webgpu_fp32=maybe"), 2, r"must be true or false"),
    ],
)
def test_wrong_use(
    args: tuple[str, ...],
    code: int,
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("-i", tiny, "-o", tmp_path / "out", *args) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    import re

    assert re.search(message, captured.err)
    assert not list(tmp_path.iterdir())


def test_folder_with_a_name(tiny: Path, tmp_path: Path) -> None:
    """As with the official builder, both may be given; the card then names the base model."""
    assert run("-m", "acme/tiny", "-i", tiny, "-o", tmp_path / "out") == 0
    assert "base_model: acme/tiny" in (tmp_path / "out" / "README.md").read_text()


def test_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", tmp_path / "out") == 2
    assert run("-i", tmp_path / "none", "-o", tmp_path / "out") == 1
    assert "neither a folder nor a GGUF file" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "100%" not in out
    for word in ("examples:", "--extra_options", "--dry-run", "exit codes"):
        assert word in out


@pytest.mark.parametrize(
    ("given", "wanted"), [((), 512), (("--max-length", "512"), 512), (("--max_length", "1"), 1)]
)
def test_max_length(given: tuple[str, ...], wanted: int, tiny: Path, tmp_path: Path) -> None:
    assert run("-i", tiny, "-o", tmp_path / "out", "-q", "--no-check", *given) == 0
    found = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert (found["search"]["max_length"], found["model"]["context_length"]) == (wanted, 512)


def test_adapters(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters are counted before a build and shown after it."""
    row, config = lora.ADAPTERS["fused"]
    lora.save(saved(row).model, tmp_path / "lora", **config)
    flags = ("-i", saved(row).folder, "-o", tmp_path / "out", "--merge-adapter", tmp_path / "lora")
    flags = (*flags, "--adapter", f"one={tmp_path / 'lora'}", "--adapter", f"two={tmp_path / 'lora'}")
    assert run(*flags, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert run(*flags, "--dry-run") == 0
    assert "one, " in capsys.readouterr().out
    assert run(*flags, "--json") == 0
    built = json.loads(capsys.readouterr().out)
    assert planned["adapter_bytes"].keys() == {"one", "two"}
    assert built["output_bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"] == {name: f"adapters/{name}.onnx_adapter" for name in ("one", "two")}
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "merged adapter: lora" in capsys.readouterr().out
