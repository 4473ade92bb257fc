"""Quantized checkpoints that are damaged, contradict themselves, or are of a form that is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.checkpoint.quantized import METHODS
from ortlm.checkpoint.reader import open_checkpoint
from ortlm.errors import BadCheckpoint, Error, UnsupportedModel
from tests.checkpoint import quantized_files

Q = "model.layers.0.self_attn.q_proj"


def said(folder: Path, **changes: Any) -> None:
    """Change what config.json says of quantization; None takes a key out."""
    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in stated.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["hqq", "aqlm", "gtpq", "torchao", "quanto", "bitnet", "eetq", "higgs"])
def test_unknown_methods_are_named_with_what_is_read(name: str, tmp_path: Path) -> None:
    folder = quantized_files.write(tmp_path / "model", "gptq", quant_method=name)
    with pytest.raises(UnsupportedModel) as found:
        open_checkpoint(folder)
    assert repr(name) in str(found.value)
    assert all(method in str(found.value) for method in METHODS)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("gptq", {"bits": 3}, '"bits" is 3; ortlm reads 2, 4 and 8'),
        ("gptq", {"bits": True}, '"bits" is True'),
        (
            "gptq",
            {"bits": 8},
            r"qweight' in model.safetensors has shape \[16, 64\].* 32 rows: 128 inputs of 8 bits",
        ),
        ("gptq", {"group_size": 64}, "scales' has 4 groups; .* implies 2 for 128 inputs in groups of 64"),
        ("gptq", {"group_size": 0}, '"group_size" is 0'),
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            "\"checkpoint_format\" is 'marlin'; ortlm reads gptq and gptq_v2",
        ),
        ("gptq", {"pack_dtype": "int16"}, '"pack_dtype" is'),
        ("awq", {"version": "gemv"}, "\"version\" is 'gemv'; ortlm reads AWQ in the version gemm"),
        ("awq", {"bits": 8}, '"bits" is 8'),
        ("awq", {"backend": "llm-awq"}, '"backend" is'),
        ("awq", {"group_size": 16}, r"scales' .* shape \[4, 64\]; .* imply \[8, 64\]"),
        ("pack-quantized", {"format": "marlin-24"}, '"format" is'),
        ("pack-quantized", {"config_groups": {}}, 'no target in "config_groups" names'),
        ("pack-quantized", {"config_groups": None}, '"config_groups" is null'),
        ("pack-quantized", {"transform_config": {"config_groups": {"R1": {}}}}, '"transform_config" is'),
        (
            "pack-quantized",
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            '"sparsity_config.format" is',
        ),
        ("fp8", {"weight_block_size": [16, 16]}, "weight_scale_inv'.*imply"),
        ("fp8", {"weight_block_size": "128"}, '"weight_block_size" is'),
        ("fp8", {"expert_dtype": "fp4"}, '"expert_dtype" is'),
        ("gptq", {"quant_method": "bitsandbytes"}, "and none of the checkpoint's tensors is"),
        ("gptq", {"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, '"packing_format" is'),
        ("gptq", {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, '"quant_algo" is'),
        (
            "gptq",
            {"quant_method": "quark", "global_quant_config": {"weight": None}},
            "global_quant_config.weight",
        ),
    ],
)
def test_what_contradicts_its_tensors_or_is_not_read(
    method: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = quantized_files.write(tmp_path / "model", method)
    said(folder, **config)
    with pytest.raises(Error, match=message) as found:
        open_checkpoint(folder)
    assert isinstance(found.value, BadCheckpoint | UnsupportedModel)
    assert "\n" not in str(found.value)
    assert str(found.value).endswith(".")


@pytest.mark.parametrize(
    ("method", "tensors", "message"),
    [
        ("gptq", {f"{Q}.scales": None}, r"scales' is missing, which .*config.json.* imply"),
        (
            "gptq",
            {f"{Q}.qzeros": np.zeros((1, 8), np.int32)},
            r"qzeros' .* shape \[1, 8\]; .* imply \[2, 8\]",
        ),
        ("gptq", {f"{Q}.qweight": np.zeros((8, 64), np.float32)}, "qweight' .* type F32; .* implies I32"),
        ("gptq", {f"{Q}.g_idx": np.full(64, 7, np.int32)}, "g_idx' .* names the group 7; there are 2"),
        ("gptq", {f"{Q}.weight": np.zeros((64, 64), np.float32)}, "is in the checkpoint twice"),
        ("gptq", {f"{Q}.scales": np.zeros(64, np.float16)}, "imply 2 axes"),
        ("pack-quantized", {f"{Q}.weight_shape": np.array([64, 96])}, r"imply \[64, 12\]"),
        ("pack-quantized", {f"{Q}.weight_shape": None}, "weight_shape' is missing"),
        ("int-quantized", {f"{Q}.weight_scale": np.zeros((2, 1), np.float32)}, r"imply \[64, 1\]"),
        ("fp8", {f"{Q}.weight": np.zeros((64, 64), np.int8)}, "type I8; .* implies F8_E4M3 or F8_E5M2"),
    ],
)
def test_damaged_tensors(method: str, tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = quantized_files.write(tmp_path / "model", method)
    quantized_files.change(folder, **tensors)
    with pytest.raises(BadCheckpoint, match=message) as found:
        open_checkpoint(folder)
    assert "\n" not in str(found.value)


def test_numbers_are_never_read_as_weights(tmp_path: Path) -> None:
    """Without what says how they are quantized, whole numbers are no weights."""
    for method, message in (
        ("gptq", "is quantized, and neither config.json nor hf_quant_config.json, .* says how"),
        ("pack-quantized", "is quantized, and neither"),
        ("int-quantized", "element type I8"),
        ("fp8", "is quantized, and neither"),
    ):
        folder = quantized_files.write(tmp_path / method, method)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadCheckpoint, match=message):
            prepare(BuildRequest(folder))


def test_files_of_their_own_say_it_too(tmp_path: Path) -> None:
    """AutoGPTQ, AutoAWQ and Model Optimizer wrote files of their own before config.json had a key for it."""
    for method, name in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
        folder = quantized_files.write(tmp_path / method, method)
        config = json.loads((folder / "config.json").read_text())
        stated = config.pop("quantization_config")
        del stated["quant_method"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_text(json.dumps(stated))
        assert prepare(BuildRequest(folder)).kept.schemes


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = quantized_files.write(tmp_path / "model", "awq")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BadCheckpoint, match="no complete safetensors file"):
        open_checkpoint(folder)


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    folder = quantized_files.write(tmp_path / "model", "gptq")
    scales = quantized_files.tensors_of(folder)[f"{Q}.scales"].copy()
    scales[0, 0] = np.nan
    quantized_files.change(folder, **{f"{Q}.scales": scales})
    import ortlm

    for precision in ("int4", "fp32"):
        with pytest.raises(BadCheckpoint, match=r"(holds nan|cannot be scaled)"):
            ortlm.build(folder, tmp_path / "out", precision=precision)
    assert not (tmp_path / "out").exists()


def test_biases_of_zeros_that_old_quantizers_save(tmp_path: Path) -> None:
    folder = quantized_files.write(tmp_path / "model", "gptq")
    zeros = np.zeros(64, np.float16)
    quantized_files.change(folder, **{f"{Q}.bias": zeros})
    assert prepare(BuildRequest(folder)).kept.schemes
    zeros[3] = 1
    quantized_files.change(folder, **{f"{Q}.bias": zeros})
    with pytest.raises(BadCheckpoint, match=r"q_proj.bias' .* is not part of the model"):
        prepare(BuildRequest(folder))
