"""Quantized checkpoints: any configuration and any header give weights that can be read, or an error of ortlm."""

from __future__ import annotations

from hypothesis import strategies as st

from ortlm.checkpoint.quantized import read_quantized
from ortlm.checkpoint.quantized_weight import QuantizedWeight
from ortlm.checkpoint.safetensors import read_header
from tests.checkpoint import quantized_files
from tests.checkpoint.test_quantized import recorded
from tests.fuzz.harness import damaged_json, fuzz

CASES = (
    "gptq_int4_act_order", "awq_int4", "auto_round_plain", "compressed_pack_int4_zeros", "compressed_fp8_block",
    "compressed_nvfp4", "fp8_block", "mxfp4_experts", "bitsandbytes_nf4_nested", "bitsandbytes_int8", "olive_int4",
    "quark_uint4",
)  # fmt: skip
CONFIGS = {name: recorded(name)[0] for name in CASES}
FILES = {name: quantized_files.serialized(recorded(name)[1]) for name in CASES}


def read(folder, config):
    weights = read_header(folder, "model.safetensors")
    _, found = read_quantized({"quantization_config": config}, weights, folder)
    for weight in found.values():
        if not isinstance(weight, QuantizedWeight) or weight.bytes > 1 << 20:
            continue
        rows = weight.rows(0, weight.shape[0])
        assert rows.shape == weight.shape
        grid = weight.grid()
        if grid is not None:
            assert weight.codes(0, weight.shape[0], grid).codes.shape == weight.shape


@fuzz(st.sampled_from(CASES).flatmap(lambda name: st.tuples(st.just(name), damaged_json(CONFIGS[name]))))
def test_configurations(tmp_path, found):
    name, config = found
    header, data = FILES[name]
    (tmp_path / "model.safetensors").write_bytes(quantized_files.header_bytes(header) + data)
    read(tmp_path, config)


@fuzz(st.sampled_from(CASES).flatmap(lambda name: st.tuples(st.just(name), damaged_json(FILES[name][0]))))
def test_headers(tmp_path, found):
    name, header = found
    (tmp_path / "model.safetensors").write_bytes(quantized_files.header_bytes(header) + FILES[name][1])
    read(tmp_path, CONFIGS[name])
