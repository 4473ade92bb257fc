"""Writes tests/checkpoint/quantized/: one weight in each format, made and dequantized by the format's own tool.

    python -m tests.checkpoint.record_quantized

It needs torch, transformers, compressed-tensors, gptqmodel, auto-round, bitsandbytes, amd-quark and olive-ai. The
tests do without. A file holds the tensors as the tool saves them, for a module called ``proj``, ``expected``,
which the tool makes of them, and in its metadata the configuration and the tool.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "quantized"
ROWS, COLUMNS, GROUP = 32, 128, 32

Tensors = dict[str, torch.Tensor]
Case = tuple[str, dict[str, Any], Tensors, torch.Tensor]
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case by its function's name."""
    CASES[make.__name__] = make
    return make


def weight(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> torch.Tensor:
    """Return random weights [out, in] whose rows differ in size and are not around zero."""
    random = torch.Generator().manual_seed(seed)
    found = torch.randn(ROWS, COLUMNS, generator=random) * torch.rand(ROWS, 1, generator=random)
    return (found + 0.1).to(dtype)


def affine(bits: int, *, groups: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales (in fp16) and zeros [out, groups] for the columns of each group."""
    top, w = 2**bits - 1, weight()
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        part = w[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scale = part.abs().amax(1) * 2 / top
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            scale = (high - low) / top
            zero = (-low / scale).round().clamp(0, top)
        scales.append(scale.half())
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


# --- GPTQ -----------------------------------------------------------------------------------------------


def gptq(bits: int, *, symmetric: bool = False, act_order: bool = False, form: str = "gptq") -> Case:
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = TorchLinear(bits, GROUP, symmetric, act_order, COLUMNS, ROWS)
    order = torch.arange(COLUMNS, dtype=torch.int32) // GROUP
    if act_order:
        order = order[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    scales, zeros = affine(bits, groups=order, symmetric=symmetric)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight()
    layer.pack_original(linear, scales, zeros, order)
    expected = layer.dequantize_weight().T.contiguous()
    if form == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits))
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": symmetric, "desc_act": act_order,
        "checkpoint_format": form,
    }  # fmt: skip
    return "gptqmodel", config, parts(layer, "qweight", "qzeros", "scales", "g_idx"), expected


@case
def gptq_int4() -> Case:
    return gptq(4)


@case
def gptq_int4_symmetric() -> Case:
    return gptq(4, symmetric=True)


@case
def gptq_v2_int4() -> Case:
    return gptq(4, form="gptq_v2")


@case
def gptq_int4_act_order() -> Case:
    return gptq(4, act_order=True)


@case
def gptq_int8() -> Case:
    return gptq(8)


@case
def gptq_int2() -> Case:
    return gptq(2)


def auto_round(form: str) -> Case:
    if form == "auto_round:auto_gptq":
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear

    layer = QuantLinear(4, GROUP, COLUMNS, ROWS, False)
    layer.device = "cpu"
    order = torch.arange(COLUMNS, dtype=torch.int32) // GROUP
    scales, zeros = affine(4, groups=order, symmetric=False)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight()
    layer.pack(linear, scales.float(), zeros)
    layer.post_init()
    expected = layer(torch.eye(COLUMNS, dtype=torch.float16)).T.contiguous()
    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "packing_format": form,
    }
    return "auto-round", config, parts(layer, "qweight", "qzeros", "scales"), expected


@case
def auto_round_gptq() -> Case:
    return auto_round("auto_round:auto_gptq")


@case
def auto_round_plain() -> Case:
    return auto_round("auto_round")


# --- AWQ ------------------------------------------------------------------------------------------------


@case
def awq_int4() -> Case:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    order = torch.arange(COLUMNS) // GROUP
    scales, zeros = affine(4, groups=order, symmetric=False)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight()
    layer = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T, zeros=zeros.T)
    expected = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).T.contiguous()
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return "auto-round", config, parts(layer, "qweight", "qzeros", "scales"), expected


# --- compressed-tensors ---------------------------------------------------------------------------------


def compressed(form: str, dtype: torch.dtype = torch.bfloat16, **weights: Any) -> Case:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = weight(dtype)
    state = {"weight": w}
    if args.strategy == "block":
        high, wide = args.block_structure
        apart = w.reshape(ROWS // high, high, COLUMNS // wide, wide)
        low, top = apart.amin((1, 3)), apart.amax((1, 3))
    elif args.strategy == "tensor":
        low, top = w.amin().reshape(1), w.amax().reshape(1)
    else:
        size = args.group_size if args.group_size and args.group_size > 0 else COLUMNS
        apart = w.reshape(ROWS, -1, size)
        low, top = apart.amin(-1), apart.amax(-1)
    if form == "nvfp4-pack-quantized":
        state["weight_global_scale"] = (448 * 6 / w.abs().max().float()).reshape(1)
    scale, zero = calculate_qparams(low, top, args, state.get("weight_global_scale"))
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero
    codec = BaseCompressor.get_value_from_registry(form)
    saved = codec.compress(state, scheme)
    expected = codec.decompress(saved, scheme)["weight"]
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return "compressed-tensors", config, {f"proj.{name}": tensor for name, tensor in saved.items()}, expected


@case
def compressed_pack_int4() -> Case:
    return compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=True)


@case
def compressed_pack_int4_zeros() -> Case:
    return compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False)


@case
def compressed_pack_int8_channel() -> Case:
    return compressed("pack-quantized", torch.float16, num_bits=8, strategy="channel", symmetric=True)


@case
def compressed_int8() -> Case:
    return compressed("int-quantized", num_bits=8, strategy="channel", symmetric=True)


@case
def compressed_int8_tensor_zeros() -> Case:
    return compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False)


@case
def compressed_fp8_channel() -> Case:
    return compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True)


@case
def compressed_fp8_tensor() -> Case:
    return compressed("float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True)


@case
def compressed_fp8_block() -> Case:
    kind = {"num_bits": 8, "type": "float", "strategy": "block", "symmetric": True}
    return compressed("float-quantized", block_structure=[16, 64], **kind)


@case
def compressed_nvfp4() -> Case:
    kind = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True, "group_size": 16}
    return compressed("nvfp4-pack-quantized", torch.float32, scale_dtype="torch.float8_e4m3fn", **kind)


@case
def compressed_mxfp4() -> Case:
    kind = {"num_bits": 4, "type": "float", "strategy": "group", "symmetric": True, "group_size": 32}
    return compressed("mxfp4-pack-quantized", scale_dtype="torch.uint8", **kind)


# --- FP8 and MXFP4, by transformers ---------------------------------------------------------------------


@case
def fp8_block() -> Case:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    w, high, wide = weight(), 16, 64
    apart = w.reshape(ROWS // high, high, COLUMNS // wide, wide)
    scale = apart.abs().amax((1, 3)) / 448
    values = (apart / scale[:, None, :, None]).reshape(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(values, scale)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [high, wide]}
    return "transformers", config, {"proj.weight": values, "proj.weight_scale_inv": scale}, expected


@case
def mxfp4_experts() -> Case:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(110, 130, (3, 8, 2), dtype=torch.uint8, generator=random)
    expected = convert_moe_packed_tensors(blocks, scales)
    tensors = {"experts.proj_blocks": blocks, "experts.proj_scales": scales}
    return "transformers", {"quant_method": "mxfp4"}, tensors, expected.contiguous()


# --- bitsandbytes ---------------------------------------------------------------------------------------


def four_bits(kind: str, *, nested: bool) -> Case:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.cat([weight(torch.float16, seed=at) for at in range(8)]) if nested else weight()
    packed, state = quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=kind)
    expected = dequantize_4bit(packed, state)
    tensors = {f"proj.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return "bitsandbytes", config, {"proj.weight": packed, **tensors}, expected


@case
def bitsandbytes_nf4() -> Case:
    return four_bits("nf4", nested=False)


@case
def bitsandbytes_nf4_nested() -> Case:
    return four_bits("nf4", nested=True)


@case
def bitsandbytes_fp4() -> Case:
    return four_bits("fp4", nested=False)


@case
def bitsandbytes_int8() -> Case:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, largest, _ = int8_vectorwise_quant(weight(torch.float16))
    expected = int8_vectorwise_dequant(codes, largest)
    tensors = {
        "proj.weight": codes,
        "proj.SCB": largest,
        "proj.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return "bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, expected


# --- Olive and Quark ------------------------------------------------------------------------------------


def _light_olive() -> None:
    """Let two modules of Olive be imported without all the rest, which its packages import."""
    if "olive" in sys.modules:
        return
    place = find_spec("olive")
    assert place is not None
    assert place.origin is not None
    for package in ("olive", "olive.common", "olive.common.quant"):
        module = types.ModuleType(package)
        module.__path__ = [str(Path(place.origin).parent.joinpath(*package.split(".")[1:]))]
        sys.modules[package] = module


def olive(bits: int, *, symmetric: bool, size: int) -> Case:
    _light_olive()
    from olive.common.quant.nn import QuantLinear

    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight()
    layer = QuantLinear.from_module(linear, bits, symmetric, size)
    expected = layer.unpack_and_dequantize(layer.qweight, layer.scales, layer.qzeros)
    config = {"quant_method": "olive", "bits": bits, "symmetric": symmetric, "group_size": size}
    names = ["qweight", "scales", *([] if symmetric else ["qzeros"])]
    return "olive-ai", config, parts(layer, *names), expected


@case
def olive_int4() -> Case:
    return olive(4, symmetric=False, size=GROUP)


@case
def olive_int8_symmetric() -> Case:
    return olive(8, symmetric=True, size=-1)


def quark(kind: str, *, method: str) -> Case:
    from quark.torch.utils.pack import Pack_4_bits

    signed = kind == "int4"
    order = torch.arange(COLUMNS) // GROUP
    scales, zeros = affine(4, groups=order, symmetric=signed)
    wide, wide_zeros = scales.float()[:, order], zeros[:, order]
    codes = (weight() / wide + wide_zeros).round().clamp(0, 15)
    shift = 8 if signed else 0
    packer = Pack_4_bits("per_group", kind)
    tensors = {
        "proj.weight": packer.pack((codes - shift).int(), reorder=method == "reorder"),
        "proj.weight_scale": scales.T.contiguous(),
        "proj.weight_zero_point": packer.pack((zeros - shift).int(), reorder=method == "reorder"),
    }
    back = packer.unpack(tensors["proj.weight"], reorder=method == "reorder").float() + shift
    zeros_back = packer.unpack(tensors["proj.weight_zero_point"], reorder=method == "reorder").float() + shift
    expected = (back - zeros_back[:, order]) * wide
    scheme = {"dtype": kind, "qscheme": "per_group", "group_size": GROUP, "ch_axis": -1, "symmetric": signed}
    config = {
        "quant_method": "quark",
        "global_quant_config": {"weight": scheme},
        "export": {"pack_method": method, "weight_format": "real_quantized"},
    }
    return "amd-quark", config, tensors, expected


@case
def quark_uint4() -> Case:
    return quark("uint4", method="reorder")


@case
def quark_int4() -> Case:
    return quark("int4", method="order")


def parts(layer: torch.nn.Module, *names: str) -> Tensors:
    """Return tensors of a layer by the names that a checkpoint has for them."""
    return {f"proj.{name}": getattr(layer, name).detach() for name in names}


def main() -> None:
    """Write all files."""
    OUT.mkdir(exist_ok=True)
    for name, make in CASES.items():
        tool, config, tensors, expected = make()
        made_by = f"{tool} {version(tool)}"
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {"config": json.dumps(config), "tool": made_by}
        save_file({**tensors, "expected": expected.contiguous()}, OUT / f"{name}.safetensors", metadata)
        print(name, made_by, {key: list(t.shape) for key, t in tensors.items()}, expected.dtype)


if __name__ == "__main__":
    main()
