"""A GGUF file built from the command line, and found again as what the model is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ortlm
from ortlm.artifact import open_artifact
from ortlm.cli import main
from ortlm.evaluation.sources import find_reference, open_checkpoint
from tests.checkpoint.gguf_bytes import file_of, smallest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    metadata, tensors = smallest()
    path = tmp_path / "small.gguf"
    path.write_bytes(file_of({**metadata, "general.license": "apache-2.0"}, tensors))
    return path


def test_build_and_reference(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["build", "-i", str(path), "-o", str(out), "-p", "fp32", "--no-check", "--quiet"]) == 0
    lm = ortlm.load(out)
    assert lm.tokenizer.encode("the") == [0, 259]
    assert lm.tokenizer.decode(lm.tokenizer.encode("the, naïve 日本")) == "the, naïve 日本"
    artifact = open_artifact(out)
    origin = find_reference(artifact)
    assert origin.source == str(path.resolve())
    source = open_checkpoint(origin, threads=1)
    tokens = np.array([0, 259, 5, 9])
    source.open([tokens])
    np.testing.assert_allclose(source.logits(0), np.asarray(lm.logits(tokens.tolist())), atol=1e-4)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0\n" in card
    assert "small.gguf" in card
    assert str(tmp_path) not in card + (out / "ortlm.json").read_text(encoding="utf-8")


def test_an_output_that_holds_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "-i", str(path), "-o", str(path.parent), "--quiet"]) == 2
    assert "which a build would replace" in capsys.readouterr().err


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    assert main(["build", "-i", str(broken), "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
