"""``ortlm evaluate`` as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ortlm.cli import main


@pytest.fixture
def model(phi: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phi, tmp_path / "phi"))


def run(*args: object) -> int:
    return main(["evaluate", *map(str, args), "--threads", "1"])


def test_tables_and_files(model: Path, phi: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--reference", phi, "--tokens", 1024, "--layers") == 0
    out, err = capsys.readouterr()
    for name in ("Mean PPL(Q)/PPL(base)", "Mean KLD", "99.9% KLD", "RMS Δp", "Same top p", "head", "decode"):
        assert name in out
    assert f"report: {model / 'report.html'}" in err
    assert (model / "report.json").is_file()


def test_json_is_what_is_written(
    model: Path, phi: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "reports"
    assert run(model, "--reference", phi, "--tokens", 512, "--no-speed", "--json", "-o", out) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "report.json").read_text(encoding="utf-8")
    assert json.loads(printed)["speed"] is None


@pytest.mark.parametrize(("limit", "code"), [("1000", 0), ("0", 3)])
def test_gate(
    limit: str, code: int, model: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = tmp_path / "fp32"
    assert main(["build", "-i", str(tiny), "-o", str(exact), "-p", "fp32", "-q"]) == 0
    options = ["--tokens", 512, "--no-speed", "-q", "--max-kld", limit]
    assert run(model, "--reference", exact, *options) == code
    assert ("above the limit of 0." in capsys.readouterr().err) == (code == 3)
    assert (model / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--reference", "MODEL", "--chunk", "4"), 2, "--chunk must be 8 to 512"),
        (("--reference", "MODEL", "--tokens", "0"), 2, "--tokens must be at least 1"),
        (("--reference", "MODEL", "--tokens", "100"), 2, "fewer than 100 say nothing"),
        (("--reference", "MODEL", "--text", "/nowhere"), 2, "--text /nowhere cannot be read"),
        (("--max-kld", "-1"), 2, "--max-kld must be 0 or more"),
        (("--reference", "MODEL", "-o", "MODEL/model.onnx"), 2, "is a file"),
    ],
)
def test_errors(
    options: tuple[str, ...], code: int, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *(word.replace("MODEL", str(model)) for word in options)) == code
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert not (model / "report.html").exists()


def test_help_is_quick() -> None:
    code = "import sys; from ortlm.cli import main; assert main(['evaluate', '--help']) == 0; "
    code += "assert not {'numpy', 'onnxruntime', 'onnx_ir', 'tokenizers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
