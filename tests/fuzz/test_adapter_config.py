"""adapter_config.json of a peft adapter: any values give what the adapter adds or an error of ortlm."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ortlm.checkpoint.patterns import Unbounded, matches
from ortlm.checkpoint.peft import read_lora
from tests.fuzz.harness import damaged_json, fuzz

VALID = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "use_rslora": True,
    "bias": "none",
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    "alpha_pattern": {"q_proj": 5},
    "init_lora_weights": True,
    "base_model_name_or_path": "x",
    "modules_to_save": None,
    "task_type": "CAUSAL_LM",
}


@pytest.fixture
def folder(tmp_path):
    tensors = {}
    for layer, rank in ((0, 2), (1, 3)):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{at}.lora_A.weight": np.ones((rank, 8), np.float32)}
        tensors |= {f"{at}.lora_B.weight": np.ones((8, rank), np.float32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


@fuzz(damaged_json(VALID))
def test_adapter_config(folder, found):
    (folder / "adapter_config.json").write_text(json.dumps(found))
    read_lora(folder, {})


@fuzz(st.text(st.sampled_from(r"qk_proj.\d+*?()|[]{}1,9^$w"), max_size=30), allowed=(Unbounded,))
def test_patterns(pattern):
    matches(pattern, "model.layers.11.self_attn.qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq_proj")
