"""Adapter files of an artifact: damaged ones are refused, or give the numbers that they hold."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ortlm
from ortlm.errors import Error
from tests.conftest import ROOT
from tests.fuzz.harness import damaged_bytes, fuzz

CHECKPOINT = ROOT / "models" / "tiny-phi3"
RANK = 2


def write_peft(folder: Path) -> None:
    """Write a small adapter of the attention's output matrices, as peft does."""
    size = json.loads((CHECKPOINT / "config.json").read_text())["hidden_size"]
    draw = np.random.default_rng(0)
    weights = {}
    for layer in range(2):
        place = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{place}.lora_A.weight"] = draw.normal(size=(RANK, size)).astype(np.float32)
        weights[f"{place}.lora_B.weight"] = draw.normal(size=(size, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@functools.cache
def model() -> tuple[ortlm.LanguageModel, bytes]:
    """Return the model, and its adapter's file."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_peft(folder / "peft")
        ortlm.build(CHECKPOINT, folder / "model", precision="fp32", adapters={"own": folder / "peft"})
        lm = ortlm.load(folder / "model", threads=1)
        assert lm.adapters == ("own",)
        lm.generate([5, 6, 7], max_new_tokens=1, adapter="own")
        return lm, next((folder / "model").rglob("*.onnx_adapter")).read_bytes()


@fuzz(st.deferred(lambda: damaged_bytes(model()[1])))
def test_bytes(tmp_path, raw):
    lm, _ = model()
    (tmp_path / "x.onnx_adapter").write_bytes(raw)
    lm.load_adapter("x", tmp_path / "x.onnx_adapter")
    try:
        lm.generate([5, 6, 7], max_new_tokens=1, adapter="x")
    finally:
        lm.unload_adapter("x")


@pytest.mark.parametrize("raw", [b"", b"x" * 100, b"\x00" * 4096, b"TORT" * 10])
def test_what_is_no_adapter(tmp_path, raw):
    (tmp_path / "x.onnx_adapter").write_bytes(raw)
    with pytest.raises(Error, match=r"x\.onnx_adapter"):
        model()[0].load_adapter("x", tmp_path / "x.onnx_adapter")
    assert model()[0].adapters == ("own",)
