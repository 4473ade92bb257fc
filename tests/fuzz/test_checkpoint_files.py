"""The files of a checkpoint next to its configuration: index, card, license, and links between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ortlm.builder.model_card import license_of
from ortlm.checkpoint import files
from ortlm.checkpoint.reader import open_checkpoint
from tests.fuzz.harness import damaged_bytes, damaged_json, fuzz

INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
CARD = b"---\nlicense: other\nlicense_name: mine\ntags: [a, b]\nx: {y: &z 1, w: *z}\n---\n# Title\n"
PLACES = (
    "x", "sub", "sub/x", ".", "..", "../secret", "/proc/self/environ", "../checkpoint/x", "LICENSE", "a\nb",
    "/dev/zero",
)  # fmt: skip
NAMES = ("LICENSE", "config.json", "x", "sub/x", "secret")


@fuzz(damaged_json(INDEX))
def test_index(tmp_path, found):
    (tmp_path / "config.json").write_text("{}")
    for name, file in (("a", "m-1.safetensors"), ("b", "m-2.safetensors")):
        save_file({name: np.ones(4, np.float32)}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(found))
    for weight in open_checkpoint(tmp_path).weights.values():
        assert weight.file.parent == tmp_path


@fuzz(damaged_bytes(CARD))
def test_card(tmp_path, raw):
    (tmp_path / "README.md").write_bytes(raw)
    found = license_of(tmp_path)
    assert found is None or (len(found) <= 200 and "\n" not in found)


@fuzz(st.lists(st.tuples(st.sampled_from(NAMES[:3]), st.sampled_from(PLACES)), max_size=4))
def test_links(tmp_path, links):
    folder = tmp_path / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    for name, to in links:
        path = folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(to)
    for name in NAMES:
        if files.present(folder, name):
            assert files.read_text(folder, name) == "inside"
            files.copy_file(folder, name, Path(tmp_path / "copy"))
