"""Damaged and incomplete checkpoints, each with its own error."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ortlm
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.checkpoint.reader import open_checkpoint, pick_weights
from ortlm.checkpoint.stack import Part, stack
from ortlm.errors import BadCheckpoint, UnsupportedModel


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def change(folder: Path, edit: Any) -> None:
    """Rewrite the weights after ``edit(dict of arrays)``."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def fails(folder: Path, tmp_path: Path, message: str, kind: type[Exception] = BadCheckpoint) -> None:
    out = tmp_path / "out"
    with pytest.raises(kind, match=message):
        ortlm.build(folder, out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_truncated_shard(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    fails(folder, tmp_path, r"model\.safetensors is no complete safetensors file")


def test_empty_shard(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    fails(folder, tmp_path, r"no complete safetensors file.*0 bytes")


def test_wrong_shape(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change(folder, lambda t: t.update({name: np.ascontiguousarray(t[name][:, :-1])}))
    fails(folder, tmp_path, rf"{name}' has shape \[256, \d+\]; config.json implies .*model.safetensors")


def test_missing_weight(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda t: t.pop("model.norm.weight"))
    fails(folder, tmp_path, r"'model.norm.weight' is missing")


def test_extra_weight(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda t: t.update({"model.layers.9.x": np.zeros(3, np.float32)}))
    fails(folder, tmp_path, r"'model.layers.9.x' in model.safetensors is not part of the model")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number(folder: Path, tmp_path: Path, bad: float) -> None:
    name = "model.layers.0.mlp.gate_up_proj.weight"

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][3, 5] = bad

    change(folder, edit)
    fails(folder, tmp_path, rf"weight '{name}' in model.safetensors holds {bad}")


def test_values_that_cannot_be_scaled(folder: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"][0, :2] = 3e38, -3e38

    change(folder, edit)
    fails(folder, tmp_path, r"head.weight has values near the largest")


def test_pickles_that_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")
    fails(folder, tmp_path, r"consolidated.00.pth, a pickle.*save_pretrained")


def test_no_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    fails(folder, tmp_path, r"no \*\.safetensors")


def test_missing_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    fails(folder, tmp_path, r"has no tokenizer.json.*Copy tokenizer.json")


def test_unknown_type(folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "phi33"}))
    fails(folder, tmp_path, r"phi33.*Did you mean: phi3", UnsupportedModel)


def test_damaged_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "phi3"')
    fails(folder, tmp_path, r"config.json cannot be read as JSON")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="neither a folder here nor a model's name"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(BadCheckpoint, match=r"no config.json"):
        find_checkpoint(tmp_path)


def test_offline_hub(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"could not be downloaded.*continue"):
        find_checkpoint("nobody/nothing", cache=tmp_path)


def shards(folder: Path) -> dict[str, str]:
    """Split the weights into two shards with an index; returns its weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    half = len(names) // 2
    where = {}
    for i, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_give_the_same_model(tiny: Path, folder: Path, tmp_path: Path) -> None:
    shards(folder)
    one, two = ortlm.build(tiny, tmp_path / "one"), ortlm.build(folder, tmp_path / "two")
    name = "model.onnx.data"
    assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_index_leaves_the_folder(folder: Path, tmp_path: Path) -> None:
    where = shards(folder)
    write_index(folder, where | {"model.norm.weight": "../../secret.safetensors"})
    fails(folder, tmp_path, r"'\.\./\.\./secret.safetensors'; only plain file names")


def test_missing_shard(folder: Path, tmp_path: Path) -> None:
    where = shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    first = next(n for n, f in where.items() if "00002-of" in f)
    fails(folder, tmp_path, rf"model-00002-of-00002.safetensors is missing.*{first}")


def test_index_promises_too_much(folder: Path, tmp_path: Path) -> None:
    where = shards(folder)
    write_index(folder, where | {"model.more": "model-00001-of-00002.safetensors"})
    fails(folder, tmp_path, r"'model.more' is not in")


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_and_columns(tmp_path: Path, kind: Any) -> None:
    values = np.random.default_rng(0).standard_normal((10, 6)).astype(kind)
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": values, "b": values + kind(1)}, tmp_path / "model.safetensors")
    weights = open_checkpoint(tmp_path).weights
    want = values.astype(np.float32)
    np.testing.assert_array_equal(weights["a"].rows(2, 7), want[2:7])
    np.testing.assert_array_equal(weights["a"].columns(1, 4), want[:, 1:4].T)
    parts = [Part(weights["a"], 0, 4), Part(weights["a"], 4, 9), Part(weights["b"], 2, 5, add=1.0)]
    tall = stack(parts)
    assert len(tall.parts) == 2
    whole = np.concatenate([want[:9], (values + kind(1)).astype(np.float32)[2:5] + 1])
    assert tall.count == 12
    np.testing.assert_array_equal(tall.rows(3, 11), whole[3:11])


def test_linked_cache(tiny: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to the blobs of the same model."""
    model = tmp_path / "models--acme--tiny"
    linked = model / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    linked.mkdir(parents=True)
    (model / "blobs").mkdir()
    for file in tiny.iterdir():
        blob = hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copyfile(file, model / "blobs" / blob)
        (linked / file.name).symlink_to(f"../../blobs/{blob}")
    ortlm.build(linked, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_a_stale_index(tiny: Path, folder: Path, tmp_path: Path) -> None:
    """transformers takes model.safetensors where there is one, whatever an index says."""
    want = (ortlm.build(tiny, tmp_path / "want").path / "model.onnx.data").read_bytes()
    where = shards(folder)
    shutil.copyfile(tiny / "model.safetensors", folder / "model.safetensors")
    for shard in set(where.values()):
        tensors = load_file(folder / shard)
        save_file({n: np.zeros_like(t) for n, t in tensors.items()}, folder / shard)
    ortlm.build(folder, tmp_path / "both")
    assert (tmp_path / "both" / "model.onnx.data").read_bytes() == want
    for shard in set(where.values()):
        (folder / shard).unlink()
    ortlm.build(folder, tmp_path / "missing")
    assert (tmp_path / "missing" / "model.onnx.data").read_bytes() == want
    (folder / "model.safetensors.index.json").write_text("not JSON")
    ortlm.build(folder, tmp_path / "damaged")
    assert (tmp_path / "damaged" / "model.onnx.data").read_bytes() == want


@pytest.mark.parametrize(
    ("there", "config", "chosen"),
    [
        (["model.safetensors", "model.safetensors.index.json", "model-1.safetensors"], {}, ["model.safetensors"]),
        (["model.safetensors.index.json", "x.safetensors"], {}, ["model-1.safetensors"]),
        (["model.fp16.safetensors"], {}, ["model.fp16.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], {}, ["model.safetensors"]),
        (["consolidated.safetensors"], {}, ["consolidated.safetensors"]),
        (["consolidated.safetensors", "a.safetensors", "b.safetensors"], {}, ["a.safetensors", "b.safetensors"]),
        (["adapter_model.safetensors", "a.safetensors"], {}, ["a.safetensors"]),
        (["pytorch_model.bin"], {}, ["pytorch_model.bin"]),
        (["onnx/model.safetensors", "pytorch_model.bin"], {}, ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin"], {}, ["model.safetensors"]),
        (["model.safetensors", "x.safetensors"], {"transformers_weights": "x.safetensors"}, ["x.safetensors"]),
        (["model.safetensors"], {"transformers_weights": "x.safetensors.index.json"}, ["model-1.safetensors"]),
    ],
)  # fmt: skip
def test_which_weights(there: list[str], config: dict[str, Any], chosen: list[str]) -> None:
    index = {"weight_map": {"w": "model-1.safetensors"}}
    assert pick_weights(there, config, lambda name: index)[0] == chosen


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/b", "C:x", "", ".."])
def test_an_index_names_plain_files_only(file: str) -> None:
    with pytest.raises(BadCheckpoint, match="only plain file names"):
        pick_weights(["model.safetensors.index.json"], {}, lambda name: {"weight_map": {"w": file}})


@pytest.mark.parametrize("named", ["../x.safetensors", 3, "pytorch_model.bin", ["x.safetensors"]])
def test_weights_that_the_configuration_names(named: Any) -> None:
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        pick_weights(["model.safetensors"], {"transformers_weights": named}, lambda name: {})
