"""``ortlm build`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ortlm.cli import main


def run(*args: object) -> int:
    return main(["build", *map(str, args)])


def test_official_flags(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", tiny, "-o", tmp_path / "out", "-p", "int4", "-e", "cpu", "-c", tmp_path / "c") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in ("size before", "size after", "bits per weight", "time", "peak memory"):
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
    assert "is not a folder" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "100%" not in out
    for word in ("examples:", "--extra_options", "--dry-run", "exit codes"):
        assert word in out
