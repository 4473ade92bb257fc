"""Checkpoints that are quantized already, packed by hand from the specification of each format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ortlm.checkpoint.safetensors import read_header
from ortlm.dtypes import BY_SAFETENSORS, Array

GROUP = 32
Tensors = dict[str, Array]
Packer = Callable[[Array], tuple[Tensors, Array]]


def save(folder: Path, tensors: Mapping[str, Array]) -> None:
    """Write model.safetensors; numpy's own writer knows no type of 8 bits for fractions."""
    header, data = serialized(tensors)
    (folder / "model.safetensors").write_bytes(header_bytes(header) + data)


def serialized(tensors: Mapping[str, Array]) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a file with ``tensors``."""
    names = {kind.numpy: kind.safetensors for kind in BY_SAFETENSORS.values()}
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": place}
        data += raw
    return header, data


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Return ``header`` as a file begins with it."""
    text = json.dumps(header).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensors_of(folder: Path) -> Tensors:
    """Return every tensor of model.safetensors in ``folder``."""
    found = read_header(folder, "model.safetensors")
    return {n: w.raw(0, w.shape[0]) if w.shape else w.raw(0, 1).reshape(()) for n, w in found.items()}


def write(folder: Path, method: str, family: str = "llama", **config: Any) -> Path:
    """Write a tiny model of ``family`` quantized by ``method``, and in "float" what its numbers stand for.

    ``config`` changes what is said of it.
    """
    # It needs transformers, which tests of recorded files do without.
    from tests.architectures import families

    folder.mkdir(parents=True, exist_ok=True)
    families.save(family, folder)
    stated, packer = METHODS[method]
    quantized, floats = {}, {}
    for name, tensor in tensors_of(folder).items():
        if method == "mxfp4":
            if "experts." in name and tensor.ndim == 3:
                parts, values = packer(tensor.astype(np.float32))
                quantized |= {f"{name}{part}": found for part, found in parts.items()}
                floats[name] = values
            else:
                quantized[name] = floats[name] = tensor
        elif tensor.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight")):
            parts, values = packer(tensor.astype(np.float32))
            quantized |= {f"{name.removesuffix('weight')}{part}": found for part, found in parts.items()}
            floats[name] = values
        else:
            quantized[name] = floats[name] = tensor
    plain = json.loads((folder / "config.json").read_text())
    beside = folder / "float"
    beside.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (beside / file.name).write_bytes(file.read_bytes())
    save(beside, floats)
    save(folder, quantized)
    (folder / "config.json").write_text(json.dumps(plain | {"quantization_config": stated | config}))
    return folder


def change(folder: Path, **tensors: Array | None) -> None:
    """Change tensors of ``folder`` by name; None takes one out."""
    found = tensors_of(folder)
    for name, tensor in tensors.items():
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save(folder, found)


def rounded(weight: Array, bits: int, groups: Array, *, symmetric: bool) -> tuple[Array, Array, Array]:
    """Return codes [out, in], scales in fp16 and zeros [out, groups] of ``weight``, rounded to nearest."""
    top, count = 2**bits - 1, int(groups.max()) + 1
    scales = np.empty((len(weight), count), np.float16)
    zeros = np.full((len(weight), count), 2 ** (bits - 1), np.int64)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, group] = np.abs(part).max(1) * 2 / top
        else:
            scales[:, group] = (high - low) / top
            # Not 0, which the first format of GPTQ cannot hold.
            zeros[:, group] = np.clip(np.rint(-low / scales[:, group]), 1, top)
    wide = scales.astype(np.float32)[:, groups]
    codes = np.clip(np.rint(weight / wide + zeros[:, groups]), 0, top).astype(np.int64)
    return codes, scales, zeros


def words(numbers: Array, bits: int) -> Array:
    """Pack numbers along the last axis into int32, the first in the lowest bits."""
    per = 32 // bits
    apart = numbers.reshape(*numbers.shape[:-1], -1, per).astype(np.uint64)
    packed = (apart << (bits * np.arange(per, dtype=np.uint64))).sum(-1)
    return packed.astype(np.uint32).view(np.int32)


def _gptq(bits: int, *, symmetric: bool, act_order: bool = False, second: bool = False) -> Packer:
    def pack(weight: Array) -> tuple[Tensors, Array]:
        inputs = weight.shape[1]
        groups = np.arange(inputs) // GROUP
        if act_order:
            groups = np.random.default_rng(0).permutation(groups)
        codes, scales, zeros = rounded(weight, bits, groups, symmetric=symmetric)
        stored = zeros if second else zeros - 1
        parts = {
            "qweight": np.ascontiguousarray(words(codes, bits).T),
            "qzeros": words(stored.T, bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": groups.astype(np.int32),
        }
        return parts, (codes - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]

    return pack


def _awq(weight: Array) -> tuple[Tensors, Array]:
    groups = np.arange(weight.shape[1]) // GROUP
    codes, scales, zeros = rounded(weight, 4, groups, symmetric=False)

    def packed(numbers: Array) -> Array:
        apart = numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(apart.reshape(len(numbers), -1), 4)

    parts = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": np.ascontiguousarray(scales.T)}
    return parts, (codes - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]


def _pack_quantized(weight: Array) -> tuple[Tensors, Array]:
    groups = np.arange(weight.shape[1]) // GROUP
    codes, scales, zeros = rounded(weight, 4, groups, symmetric=True)
    short = scales.astype(ml_dtypes.bfloat16)
    parts = {
        "weight_packed": words(codes, 4),
        "weight_scale": short,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    return parts, (codes - zeros[:, groups]).astype(np.float32) * short.astype(np.float32)[:, groups]


def _int8(weight: Array) -> tuple[Tensors, Array]:
    scales = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(weight / scales).astype(np.int8)
    return {"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * scales


def _fp8(weight: Array) -> tuple[Tensors, Array]:
    outputs, inputs = weight.shape
    high, wide = -(-outputs // GROUP), -(-inputs // GROUP)
    scales = np.empty((high, wide), np.float32)
    values = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    floats = np.empty(weight.shape, np.float32)
    for i in range(high):
        for j in range(wide):
            at = slice(i * GROUP, (i + 1) * GROUP), slice(j * GROUP, (j + 1) * GROUP)
            scales[i, j] = np.abs(weight[at]).max() / 448
            values[at] = (weight[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
            floats[at] = values[at].astype(np.float32) * scales[i, j]
    return {"weight": values, "weight_scale_inv": scales}, floats


def _mxfp4(weight: Array) -> tuple[Tensors, Array]:
    """Round experts [experts, in, out] to FP4 along their inputs."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    apart = np.ascontiguousarray(weight.transpose(0, 2, 1)).reshape(len(weight), weight.shape[2], -1, 32)
    exponents = np.floor(np.log2(np.abs(apart).max(-1) / 4)).astype(np.int32)
    codes = np.abs(apart[..., None] / np.exp2(exponents)[..., None, None] - table).argmin(-1)
    values = (table[codes] * np.exp2(exponents)[..., None]).astype(np.float32)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    parts = {"_blocks": packed, "_scales": (exponents + 127).astype(np.uint8)}
    whole = values.reshape(len(weight), weight.shape[2], -1).transpose(0, 2, 1)
    return parts, np.ascontiguousarray(whole)


def _compressed(form: str, **weights: Any) -> Mapping[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
METHODS: dict[str, tuple[Any, Packer]] = {
    "gptq": (_GPTQ, _gptq(4, symmetric=True)),
    "gptq-zeros": (_GPTQ | {"sym": False}, _gptq(4, symmetric=False)),
    "gptq-v2": (
        _GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        _gptq(4, symmetric=False, second=True),
    ),
    "gptq-8": (_GPTQ | {"bits": 8}, _gptq(8, symmetric=True)),
    "gptq-act-order": (_GPTQ | {"desc_act": True}, _gptq(4, symmetric=True, act_order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, _awq),
    "pack-quantized": (
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
        _pack_quantized,
    ),
    "int-quantized": (_compressed("int-quantized", num_bits=8, type="int", strategy="channel"), _int8),
    "mxfp4": ({"quant_method": "mxfp4"}, _mxfp4),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, _fp8),
}
