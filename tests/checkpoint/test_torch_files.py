"""pytorch_model.bin: the same weights as from safetensors, through torch, and nothing but weights."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ortlm
from ortlm.checkpoint import torch_files
from ortlm.checkpoint.reader import open_checkpoint
from ortlm.errors import BadCheckpoint


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint without its weights."""
    made = tmp_path / "model"
    shutil.copytree(tiny, made)
    (made / "model.safetensors").unlink()
    return made


@pytest.mark.parametrize("kind", ["one", "old", "shards"])
def test_the_same_as_from_safetensors(kind: str, tiny: Path, folder: Path, tmp_path: Path) -> None:
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(tiny / "model.safetensors").items()}
    if kind == "shards":
        names = sorted(tensors)
        where = {}
        for at, half in enumerate((names[::2], names[1::2]), 1):
            file = f"pytorch_model-{at:05d}-of-00002.bin"
            torch.save({name: tensors[name] for name in half}, folder / file)
            where |= dict.fromkeys(half, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "one")
    found = open_checkpoint(folder)
    assert found.weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        weight, want = found.weights[name], tensor.float().numpy()
        assert (weight.shape, weight.dtype.name) == (want.shape, "bf16")
        np.testing.assert_array_equal(weight.rows(0, len(want)), want)
        np.testing.assert_array_equal(weight.rows(1, 3), want[1:3])
        if want.ndim == 2:
            np.testing.assert_array_equal(weight.columns(1, 3), want[:, 1:3].T)
    artifact = ortlm.build(folder, tmp_path / "out", precision="fp32")
    assert np.isfinite(np.asarray(ortlm.load(artifact.path).logits([1, 2, 3]))).all()


class Evil:
    """What makes an ordinary pickle run code."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_nothing_but_tensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "pytorch_model.bin"
    torch.save({"x": Evil()}, file)
    with pytest.raises(BadCheckpoint, match=r"pytorch_model.bin cannot be read as tensors and nothing else"):
        open_checkpoint(folder)
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadCheckpoint, match="cannot be read as tensors"):
        open_checkpoint(folder)
    assert "ran" not in capsys.readouterr().out
    torch.save({"epoch": 3, "model": {}}, file)
    with pytest.raises(BadCheckpoint, match="is not a table of tensors by name"):
        open_checkpoint(folder)
    torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, file)
    with pytest.raises(BadCheckpoint, match=r"'x' .* is of the type complex64"):
        open_checkpoint(folder)
    torch.save({"x": torch.zeros(9999)}, file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(BadCheckpoint, match="cannot be read as tensors"):
        open_checkpoint(folder)


def test_without_torch_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(torch_files.importlib, "import_module", missing)
    with pytest.raises(
        BadCheckpoint, match=r"torch is not installed. Install it \(pip install torch\), or convert it"
    ):
        open_checkpoint(folder)
    monkeypatch.setattr(torch_files.importlib, "import_module", real)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(BadCheckpoint, match=r"torch 2.5.1\+cpu may run code of it; 2.6 and later"):
        open_checkpoint(folder)


def test_a_file_that_changes(folder: Path) -> None:
    torch.save({"x": torch.zeros(4)}, folder / "pytorch_model.bin")
    weight = open_checkpoint(folder).weights["x"]
    torch.save({"x": torch.ones(5)}, folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="has changed since the build began"):
        weight.rows(0, 4)
