"""How a build ends: the check comes first, and the old artifact goes only when the new one has passed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ortlm.builder import output_dir, pipeline, verification
from ortlm.calibration import run as calibration
from ortlm.cli import main
from ortlm.errors import BadArtifact, Error


def build(tiny: Path, out: Path, *more: object) -> int:
    return main(["build", "-i", str(tiny), "-o", str(out), "--quiet", "--force", *map(str, more)])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


FAST = ("--recipe", "fast")
TEXT = Path(__file__).parents[2] / "docs" / "quantization.md"
CALIBRATED = ("--recipe", "balanced", "--calibration", TEXT, "--calibration-tokens", "256")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            Error("the reference gives logits that are no finite numbers."),
            1,
            "did not pass its check: the reference",
        ),
        (
            BadArtifact("FOLDER/tokenizer.json cannot be read as a tokenizer."),
            1,
            "cannot be read as a tokenizer",
        ),
        (KeyboardInterrupt(), 130, "interrupted: "),
        (MemoryError(), 1, "there is not enough memory"),
        (OSError(28, "No space left on device"), 1, "became full while"),
        (OSError(5, "Input/output error"), 1, ": Input/output error"),
    ],
    ids=str,
)
def test_a_check_that_fails(
    error: BaseException, code: int, said: str, tiny: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert build(tiny, out, "--no-check", "--recipe", "fast") == 0
    before = contents(out)
    for target in (out, tmp_path / "new"):
        with monkeypatch.context() as patch:
            patch.setattr(verification, "quick_check", raising(error))
            assert build(tiny, target, *FAST) == code
        told = capsys.readouterr().err
        assert said in told
        assert "partial-" not in told
        assert len(told.splitlines()) == 1
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_check_keeps_the_calibration(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(verification, "quick_check", raising(KeyboardInterrupt()))
        assert build(tiny, out, *CALIBRATED) == 130
    assert "interrupted: nothing was left behind; 4 layers are calibrated and kept" in capsys.readouterr().err
    assert (tmp_path / ".out.calibration").stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "LayerQuantizer", raising(AssertionError("calibrated again")))
        assert build(tiny, out, *CALIBRATED) == 0
    assert build(tiny, tmp_path / "whole", *CALIBRATED) == 0
    assert (out / "model.onnx.data").read_bytes() == (tmp_path / "whole" / "model.onnx.data").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_weights_that_an_artifact_shares_are_not_written_to(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between putting in place and forgetting, a calibration has one file with the artifact."""
    out = tmp_path / "out"
    monkeypatch.setattr(calibration.CalibrationProgress, "forget", lambda self: None)
    assert build(tiny, out, *CALIBRATED) == 0
    kept = tmp_path / ".out.calibration"
    assert (kept / "weights.data").samefile(out / "model.onnx.data")
    found = json.loads((kept / "state.json").read_text())
    (kept / "state.json").write_text(json.dumps({**found, "complete": False}))
    state = calibration.CalibrationProgress.open(kept, found["fingerprint"])
    assert state.resumed
    assert not state.data.samefile(out / "model.onnx.data")
    monkeypatch.undo()
    before = contents(out)
    assert build(tiny, out, *CALIBRATED) == 0
    assert contents(out)["model.onnx.data"] == before["model.onnx.data"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_the_check_found_is_in_the_manifest(tiny: Path, tmp_path: Path) -> None:
    assert build(tiny, tmp_path / "out", *FAST) == 0
    found = json.loads((tmp_path / "out" / "ortlm.json").read_text())["info"]
    assert found["check"]["finite"] is True
    assert set(found["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"ortlm.json"}


def test_another_device_is_not_a_failure(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "quick_check", raising(BadArtifact("no such device.")))
    assert build(tiny, tmp_path / "out", "-e", "cuda", *FAST) == 0
    assert "not checked: no such device. Evaluate it where" in capsys.readouterr().err
    assert (tmp_path / "out" / "ortlm.json").is_file()


def test_what_a_kill_between_renames_left(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert build(tiny, out, *FAST) == 0
    out.rename(tmp_path / ".out.replaced-0123abcd")
    monkeypatch.setattr(pipeline, "write", raising(AssertionError("built before it was refused")))
    assert main(["build", "-i", str(tiny), "-o", str(out), *FAST]) == 2
    assert "holds an artifact already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_both_ways_to_replace(
    exchanged: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if not exchanged:
        monkeypatch.setattr(output_dir, "_exchange", lambda one, other: False)
    assert build(tiny, out, *FAST, "-p", "int8") == 0
    first = output_dir.identity(out)
    assert build(tiny, out, *FAST) == 0
    assert output_dir.identity(out) != first
    assert json.loads((out / "ortlm.json").read_text())["info"]["precision"] == "int4"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux")
def test_names_are_exchanged(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not output_dir._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this disk does not know how")
    assert (tmp_path / "a" / "b").exists()
    with pytest.raises(OSError, match="No such file"):
        output_dir._exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.skipif(os.name == "nt", reason="no signals there")
@pytest.mark.parametrize("where", ["_exchange", "_replace"])
def test_a_signal_while_names_change(where: str, tiny: Path, tmp_path: Path) -> None:
    """It waits until one of the two artifacts is in place."""
    out = tmp_path / "out"
    assert build(tiny, out, *FAST) == 0
    code = (
        "import os, signal, sys\n"
        "from ortlm.builder import output_dir\n"
        "from ortlm.cli import main\n"
        "if sys.argv[1] == '_replace': output_dir._exchange = lambda *_: False\n"
        "inner = getattr(output_dir, sys.argv[1])\n"
        "def late(*a):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); found = inner(*a); os.kill(os.getpid(), signal.SIGINT)\n"
        "    return found\n"
        "setattr(output_dir, sys.argv[1], late)\n"
        "sys.exit(main(['build', *sys.argv[2:]]))\n"
    )
    arguments = ["-i", tiny, "-o", out, "--force", "--no-check", "-p", "int8"]
    done = subprocess.run(
        [sys.executable, "-c", code, where, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted: the new model is whole")
    assert json.loads((out / "ortlm.json").read_text())["info"]["precision"] == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="no owners there")
@pytest.mark.parametrize("kind", ["link", "file", "other"])
def test_folders_that_somebody_planted(
    kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    (home / "diary").write_text("dear")
    for name in ("calibration", "partial-00000000", "replaced-00000000"):
        planted = tmp_path / f".out.{name}"
        if kind == "link":
            planted.symlink_to(home)
        elif kind == "file":
            planted.write_text("x")
        else:
            planted.mkdir()
            (planted / "ortlm.json").write_text("{}")
    if kind == "other":
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert build(tiny, out, *CALIBRATED) == 2
    assert ".out.calibration" in capsys.readouterr().err
    assert not out.exists()
    assert (home / "diary").read_text() == "dear"
    if kind == "other":
        assert (tmp_path / ".out.replaced-00000000" / "ortlm.json").exists()


@pytest.mark.parametrize("free", [None, 1000])
def test_a_model_beyond_memory_is_checked_in_parts(
    free: int | None,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verification, "_available_bytes", lambda: free)
    assert build(tiny, tmp_path / "out", *FAST) == 0
    check = json.loads((tmp_path / "out" / "ortlm.json").read_text())["info"]["check"]
    assert check["finite"]
    assert 0 < check["kld"] < 0.5
    assert bool(check["continuation"]) == (free is None)


def test_what_is_beyond_memory_and_cannot_be_cut_is_not_checked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "_available_bytes", lambda: 1000)
    assert build(tiny, tmp_path / "out", *FAST, "--fast-prompts") == 0
    assert "not checked: running it takes about" in capsys.readouterr().err
