"""Checkpoints of AMD's Quark: FP8, MXFP4, int8, and four bits in groups, which lie as AWQ's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm._utils.checked_json import is_integer
from ortlm.checkpoint.awq import ORDER, int4_weight
from ortlm.checkpoint.fp8 import fp8_weight
from ortlm.checkpoint.mxfp4 import fp4_weight
from ortlm.checkpoint.quantized_integers import Integers, IntegerWeight, even_groups
from ortlm.checkpoint.quantized_tensors import QuantizedTensors, as_vector
from ortlm.checkpoint.safetensors import Weight

READS = "fp8_e4m3, fp4 in groups of 32 (MXFP4), int8, and int4 and uint4 in groups"
_ACTIVATIONS = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "bias_scale", "bias_zero_point",
)  # fmt: skip


def read_quark(found: QuantizedTensors) -> None:
    """Put together the weights of a checkpoint of Quark."""
    export, whole = (found.config.get(key) or {} for key in ("export", "global_quant_config"))
    if not isinstance(export, Mapping) or not isinstance(whole, Mapping):
        raise found.refused(
            "global_quant_config", found.config.get("global_quant_config"), "objects of settings"
        )
    if export.get("weight_format", "real_quantized") != "real_quantized":
        raise found.refused("export.weight_format", export["weight_format"], "real_quantized")
    if found.config.get("layer_quant_config"):
        raise found.refused(
            "layer_quant_config", found.config["layer_quant_config"], "one scheme for all layers"
        )
    scheme: Any = whole.get("weight")
    if not isinstance(scheme, Mapping):
        raise found.refused("global_quant_config.weight", scheme, "one scheme")
    found.drop(*_ACTIVATIONS)
    reorder = export.get("pack_method", "reorder") == "reorder"
    for module in found.modules("weight_scale"):
        found.add(_weight(found, module, scheme, reorder=reorder))


def _weight(found: QuantizedTensors, module: str, scheme: Mapping[str, Any], *, reorder: bool) -> Weight:
    kind, form = scheme.get("dtype"), scheme.get("qscheme")
    if kind == "fp8_e4m3" and form in ("per_tensor", "per_channel") and scheme.get("ch_axis") in (None, 0):
        return fp8_weight(found, module, "weight_scale", None, "Quark FP8")
    if kind in ("fp4", "mx") and form == "per_group" and scheme.get("group_size") == 32:
        packed = found.need(module, "weight", ("uint8",))
        scales = found.need(module, "weight_scale", ("uint8", "e8m0"))
        return fp4_weight(found, f"{module}.weight", packed, scales, "Quark MXFP4")
    if kind in ("int4", "uint4") and form == "per_group":
        return _four_bits(found, module, scheme, signed=kind == "int4", order=ORDER if reorder else None)
    if kind == "int8" and form in ("per_tensor", "per_channel") and scheme.get("ch_axis") in (None, 0):
        return _eight_bits(found, module)
    raise found.refused("global_quant_config.weight", f"{kind} {form}", READS)


def _four_bits(
    found: QuantizedTensors,
    module: str,
    scheme: Mapping[str, Any],
    *,
    signed: bool,
    order: tuple[int, ...] | None,
) -> IntegerWeight:
    size: Any = scheme.get("group_size")
    if not is_integer(size) or size < 1:
        raise found.refused("group_size", size, "numbers above 0")
    names = ("weight", "weight_scale", "weight_zero_point")
    return int4_weight(found, module, size, "Quark int4", names=names, order=order, signed=signed)


def _eight_bits(found: QuantizedTensors, module: str) -> IntegerWeight:
    values = found.need(module, "weight", ("int8",))
    scales = as_vector(found.need(module, "weight_scale", axes=None))
    outputs, inputs = values.shape
    if scales.shape not in ((1,), (outputs,)):
        raise found.wrong(scales, f"[1] or [{outputs}]")
    zeros = found.take(module, "weight_zero_point", ("int8", "int32", "int64"))
    if zeros is not None and as_vector(zeros).raw(0, as_vector(zeros).shape[0]).any():
        raise found.refused("global_quant_config.weight.symmetric", False, "int8 without zero points")
    return IntegerWeight(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=scales.dtype,
        stamp=values.stamp,
        offset=values.offset,
        kind="Quark int8",
        calibrated=True,
        integers=Integers(values, 8, inputs, signed=True),
        scales=scales,
        groups=even_groups(inputs, inputs),
        stored_bytes=values.bytes + scales.bytes,
    )
