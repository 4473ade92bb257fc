"""Weights that are quantized already: bit for bit what the tool of each format makes of its own tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from ortlm.checkpoint.quantized import read_quantized
from ortlm.checkpoint.quantized_weight import Grid, QuantizedWeight
from ortlm.checkpoint.safetensors import Weight, check_finite, read_header
from ortlm.dtypes import Array
from ortlm.quant.pack import pack
from ortlm.quant.rtn import Packed, dequantize
from ortlm.quant.scheme import Scheme
from tests.checkpoint.quantized_files import save

RECORDED = sorted(path.stem for path in (Path(__file__).parent / "quantized").glob("*.safetensors"))
# On which grid values lie: bits, block, symmetric; None: on none.
GRIDS = {
    "auto_round_gptq": (4, 32, False),
    "auto_round_plain": (4, 32, False),
    "awq_int4": (4, 32, False),
    "bitsandbytes_fp4": None,
    "bitsandbytes_int8": None,
    "bitsandbytes_nf4": None,
    "bitsandbytes_nf4_nested": None,
    "compressed_fp8_block": None,
    "compressed_fp8_channel": None,
    "compressed_fp8_tensor": None,
    "compressed_int8": (8, 128, True),
    "compressed_int8_tensor_zeros": (8, 128, False),
    "compressed_mxfp4": (8, 32, True),
    "compressed_nvfp4": None,
    "compressed_pack_int4": (4, 32, True),
    "compressed_pack_int4_zeros": (4, 32, False),
    "compressed_pack_int8_channel": (8, 128, True),
    "fp8_block": None,
    "gptq_int2": (2, 32, False),
    "gptq_int4": (4, 32, False),
    "gptq_int4_act_order": None,
    "gptq_int4_symmetric": (4, 32, True),
    "gptq_int8": (8, 32, False),
    "gptq_v2_int4": (4, 32, False),
    "mxfp4_experts": None,
    "olive_int4": (4, 32, False),
    "olive_int8_symmetric": (8, 128, True),
    "quark_int4": (4, 32, True),
    "quark_uint4": (4, 32, False),
}


def recorded(name: str) -> tuple[dict[str, Any], dict[str, Array], Array]:
    """Return configuration, tensors and expected values of a file that ``record_quantized`` wrote."""
    path = Path(__file__).parent / "quantized" / f"{name}.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    tensors = {}
    for key, tensor in read_header(path.parent, path.name).items():
        whole = tensor.raw(0, tensor.shape[0] if tensor.shape else 1)
        tensors[key] = whole.reshape(tensor.shape)
    expected = tensors.pop("expected")
    return json.loads(metadata["config"]), tensors, expected


def opened(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> dict[str, Weight]:
    """Return the weights that a folder with these ``tensors`` holds."""
    save(folder, tensors)
    weights = read_header(folder, "model.safetensors")
    return read_quantized({"quantization_config": dict(config)}, weights, folder)[1]


def test_all_are_recorded() -> None:
    assert sorted(GRIDS) == RECORDED


@pytest.mark.parametrize("name", RECORDED)
def test_values_are_the_tools(name: str, tmp_path: Path) -> None:
    config, tensors, expected = recorded(name)
    [weight] = opened(tmp_path, config, tensors).values()
    assert isinstance(weight, QuantizedWeight)
    assert weight.shape == expected.shape
    found = weight.rows(0, weight.shape[0])
    assert found.dtype == np.float32
    # The tool computes in the type that the scales have; one rounding is between the two.
    np.testing.assert_array_equal(found.astype(expected.dtype), expected)
    # A few rows are the same as all of them.
    last = weight.shape[0]
    np.testing.assert_array_equal(np.concatenate([weight.rows(0, 1), weight.rows(1, last)]), found)
    check_finite(found, weight)
    assert weight.bytes == sum(t.nbytes for key, t in tensors.items() if _counts(key))
    if found.ndim == 2:
        np.testing.assert_array_equal(weight.columns(5, 9), found[:, 5:9].T)


def _counts(key: str) -> bool:
    return not key.endswith(("g_idx", "weight_shape", "weight_format", "weight_global_scale")) and (
        "quant_state" not in key
    )


@pytest.mark.parametrize("name", RECORDED)
def test_codes_are_the_values(name: str, tmp_path: Path) -> None:
    """Dequantized as ONNX Runtime does, codes are bit for bit what the weight's rows are."""
    config, tensors, _ = recorded(name)
    [weight] = opened(tmp_path, config, tensors).values()
    assert isinstance(weight, QuantizedWeight)
    own = weight.grid()
    assert (own and (own.bits, own.block, own.symmetric)) == GRIDS[name]
    if own is None:
        return
    for grid in (own, Grid(8, 16, own.symmetric), Grid(own.bits, own.block, symmetric=False)):
        codes, scales, zeros = weight.codes(2, 29, grid)
        assert codes.max() < 1 << grid.bits
        assert (zeros is None) == grid.symmetric
        scheme = Scheme(grid.bits, grid.block, grid.symmetric)
        packed = Packed(pack(codes, grid.bits), scales, None if zeros is None else pack(zeros, grid.bits))
        np.testing.assert_array_equal(dequantize(packed, scheme, weight.shape[1]), weight.rows(2, 29))
        if own.half:
            np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)
