"""Adapters that become part of the weights, against peft: all that a LoRA may be, and several of them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import ortlm
from ortlm.builder.options import parse_merged
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel
from ortlm.evaluation.evaluate import evaluate
from tests.architectures import families, oracle

TOKENS = oracle.random_tokens(32)
# Family and what peft is asked for.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj", "o_proj"]}),
    "dora-fused": ("phi3", {"use_dora": True, "target_modules": "all-linear"}),
    "dora-rslora-patterns": (
        "qwen2",
        {
            "use_dora": True,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 7},
            "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 11},
        },
    ),
    "saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "saved-plus-one": ("gemma2", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "saved-tied": ("qwen2-tied", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embeddings-tied": ("qwen2-tied", {"target_modules": ["embed_tokens"]}),
    "embeddings-and-head": ("qwen2-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    # Of one of these matrices only some rows are multiplied as a matrix of attention is.
    "rows-apart": ("granite4-h", {"target_modules": ["in_proj", "input_linear", "q_proj"]}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
}


def adapted(model: Any, folder: Path, *, seed: int = 1, **config: Any) -> Any:
    """Write an adapter with random numbers everywhere to ``folder``, and return the adapted model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=6, **config)).eval()
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in found.named_parameters():
                noise = torch.randn(weight.shape, generator=random)
                if "magnitude" in name:
                    weight.mul_(1 + 0.3 * noise)
                elif ".lora_" in name:
                    weight.copy_(noise * 0.7 / weight.shape[-1] ** 0.5)
                elif weight.requires_grad:
                    weight.add_(noise * 0.3 * weight.std())
        found.save_pretrained(folder)
    return found


def built(base: Path, out: Path, merged: Any) -> np.ndarray:
    artifact = ortlm.build(base, out, precision="fp32", merge_adapter=merged)
    return np.asarray(ortlm.load(artifact.path).logits(TOKENS))


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    family, config = ADAPTERS[name]
    model = families.save(family, tmp_path / "base")
    changed = adapted(model, tmp_path / "adapter", **config)
    want = oracle.prompt_logits(changed, TOKENS)
    assert oracle.relative_error(oracle.prompt_logits(model, TOKENS), want) > 0.05
    assert (
        oracle.relative_error(built(tmp_path / "base", tmp_path / "out", tmp_path / "adapter"), want) < 1e-5
    )


def test_the_reference_of_evaluation_has_them_too(tmp_path: Path) -> None:
    """One that unties the head as well, which the reference did not know."""
    model = families.save("qwen2-tied", tmp_path / "base")
    adapted(model, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    ortlm.build(
        tmp_path / "base", tmp_path / "out", precision="fp32", merge_adapter=[(tmp_path / "adapter", 0.5)]
    )
    report = evaluate(tmp_path / "out", tokens=512, chunk=128, threads=1)
    assert report.statistics.kld.value < 1e-6


def test_several_in_order_with_numbers(tmp_path: Path) -> None:
    model = families.save("llama", tmp_path / "base")
    one = adapted(model, tmp_path / "one", target_modules=["q_proj", "up_proj"])
    adapted(model, tmp_path / "two", seed=2, target_modules=["q_proj", "down_proj"])
    one.load_adapter(tmp_path / "two", "two")
    one.base_model.set_adapter(["default", "two"])
    for module in one.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, weight in (("default", 0.7), ("two", -1.5)):
                if name in module.scaling:
                    module.set_scale(name, weight)
    want = oracle.prompt_logits(one.eval(), TOKENS)
    merged = [(tmp_path / "one", 0.7), (tmp_path / "two", -1.5)]
    assert oracle.relative_error(built(tmp_path / "base", tmp_path / "out", merged), want) < 1e-5
    info = ortlm.open_artifact(tmp_path / "out").manifest.info
    assert info["merged_adapter"] == "one=0.7, two=-1.5"


def test_dora_after_another(tmp_path: Path) -> None:
    """The lengths of DoRA's rows are those of the model's own weights, as peft merges."""
    model = families.save("llama", tmp_path / "base")
    one = adapted(model, tmp_path / "one", target_modules=["q_proj"])
    adapted(model, tmp_path / "two", seed=2, target_modules=["q_proj", "down_proj"], use_dora=True)
    one.load_adapter(tmp_path / "two", "two")
    merged = one.merge_and_unload(adapter_names=["default", "two"])
    want = oracle.prompt_logits(merged.eval(), TOKENS)
    found = built(tmp_path / "base", tmp_path / "out", [tmp_path / "one", tmp_path / "two"])
    assert oracle.relative_error(found, want) < 1e-5


def test_what_cannot_be_switched_says_how_it_can_be_had(tmp_path: Path) -> None:
    for name in ("dora", "saved", "embeddings", "biases", "rows-apart"):
        family, config = ADAPTERS[name]
        model = families.save(family, tmp_path / name / "base")
        adapted(model, tmp_path / name / "adapter", **config)
        with pytest.raises(UnsupportedModel, match=r"cannot be switched at run time.*--merge-adapter"):
            prepare(BuildRequest(tmp_path / name / "base", adapters={"x": tmp_path / name / "adapter"}))


def test_what_contradicts(tmp_path: Path) -> None:
    model = families.save("llama", tmp_path / "base")
    config: Mapping[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    for name in ("one", "two"):
        adapted(model, tmp_path / name, **config)
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(BadOption, match=r"one and .*two both replace lm_head.weight"):
        prepare(BuildRequest(tmp_path / "base", merge_adapter=[one, two]))
    with pytest.raises(
        BadOption, match=r"replaces whole weights \(lm_head.weight\), which cannot count 0.5 times"
    ):
        prepare(BuildRequest(tmp_path / "base", merge_adapter=[(one, 0.5)]))
    tensors = load_file(one / "adapter_model.safetensors")
    shutil.copytree(one, tmp_path / "resized")
    wide = {"base_model.model.lm_head.weight": np.zeros((300, 64), np.float32)}
    save_file({**tensors, **wide}, tmp_path / "resized" / "adapter_model.safetensors")
    with pytest.raises(
        BadCheckpoint, match=r"shape \[300, 64\], and the model's .* a vocabulary that was resized"
    ):
        prepare(BuildRequest(tmp_path / "base", merge_adapter=tmp_path / "resized"))
    score = {"base_model.model.score.weight": np.zeros((2, 64), np.float32)}
    save_file({**tensors, **score}, tmp_path / "resized" / "adapter_model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"changes 'score.weight', which the model has not"):
        prepare(BuildRequest(tmp_path / "base", merge_adapter=tmp_path / "resized"))
    stated = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**stated, "modules_to_save": None}))
    with pytest.raises(
        BadCheckpoint, match=r"is a whole weight, and adapter_config.json has no modules_to_save"
    ):
        prepare(BuildRequest(tmp_path / "base", merge_adapter=one))


def test_options_of_the_command_line() -> None:
    assert parse_merged(["a", "./b=0.5", "c=d", "e=f=-2"]) == [
        ("a", 1),
        ("./b", 0.5),
        ("c=d", 1),
        ("e=f", -2),
    ]
    for wrong in ("", "=1", "a=0", "a=nan", "a=inf"):
        with pytest.raises(BadOption, match="--merge-adapter takes PATH or PATH=NUMBER"):
            parse_merged([wrong])
