"""Checkpoints of the compressed-tensors library, which LLM Compressor writes.

Weights lie as ``weight_packed`` (whole numbers, eight or four in an int32), or as ``weight`` in int8 or FP8, each
with ``weight_scale`` and perhaps ``weight_zero_point``; FP4 as ``weight_packed`` in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ortlm._utils.checked_json import is_integer, shown
from ortlm.checkpoint.fp8 import fp8_weight
from ortlm.checkpoint.mxfp4 import fp4_weight
from ortlm.checkpoint.patterns import Unbounded, starts
from ortlm.checkpoint.quantized_floats import Fp4Weight, ScaledWeight
from ortlm.checkpoint.quantized_integers import Integers, IntegerWeight, even_groups
from ortlm.checkpoint.quantized_tensors import QuantizedTensors, as_vector
from ortlm.checkpoint.safetensors import FLOATS, Weight
from ortlm.errors import BadCheckpoint, UnsupportedModel

READS = (
    "pack-quantized (2, 4 and 8 bits), int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized, "
    "mxfp4-pack-quantized and mixed-precision"
)
_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale",
    "v_scale", "q_scale", "k_zero_point", "v_zero_point",
)  # fmt: skip
_FP8 = ("fp8_e4m3",)
_Scheme = Mapping[str, Any]


def read_compressed_tensors(found: QuantizedTensors) -> None:
    """Put together the weights of a checkpoint of compressed-tensors."""
    config = found.config
    form = config.get("format", "dense")
    if form not in _FORMATS:
        raise found.refused("format", form, READS)
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise found.refused("sparsity_config.format", sparsity["format"], "dense weights")
    transforms = config.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise found.refused("transform_config", transforms, "weights that need no transform of activations")
    found.drop(*_ACTIVATIONS)
    for module in found.modules("weight_scale"):
        found.add(_weight(found, module, _scheme(found, module)))


def _scheme(found: QuantizedTensors, module: str) -> _Scheme:
    """Return how the weight of ``module`` is quantized: by its name, by a pattern, else by its class."""
    groups = found.config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise found.refused("config_groups", groups, "an object of schemes")
    # Modules of other classes that have such weights are linear layers in all but name.
    best: tuple[int, Any] = (3, None)
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, Mapping) else None
        for target in targets if isinstance(targets, list) else ():
            rank = _rank(found, str(target), module)
            if rank < best[0]:
                best = rank, group.get("weights")
    if not isinstance(best[1], Mapping):
        raise BadCheckpoint(
            f'{found.where}: no target in "config_groups" names {shown(module)}, and the checkpoint has it '
            "quantized. One of the two belongs to another checkpoint."
        )
    return best[1]


def _rank(found: QuantizedTensors, target: str, module: str) -> int:
    if target == module:
        return 0
    if not target.startswith("re:"):
        return 2 if target.isidentifier() else 3
    try:
        return 1 if starts(target.removeprefix("re:"), module) else 3
    except Unbounded as error:
        raise UnsupportedModel(
            f"{found.where}: the target {shown(target)} cannot be used as a regular expression: {error}."
        ) from error


def _weight(found: QuantizedTensors, module: str, scheme: _Scheme) -> Weight:
    bits, kind = scheme.get("num_bits", 8), scheme.get("type", "int")
    if kind == "float":
        if bits == 8:
            return _fp8(found, module, scheme)
        if bits == 4:
            return _fp4(found, module, scheme)
        raise found.refused("weights.num_bits", bits, "floating-point weights of 4 and 8 bits")
    if kind != "int" or not is_integer(bits) or bits not in (2, 4, 8):
        raise found.refused("weights.num_bits", bits, "whole numbers of 2, 4 and 8 bits")
    return _whole(found, module, scheme, bits)


def _whole(found: QuantizedTensors, module: str, scheme: _Scheme, bits: int) -> Weight:
    packed = found.take(module, "weight_packed", ("int32",))
    if packed is not None:
        shape = found.need(module, "weight_shape", ("int64", "int32"), axes=1)
        outputs, inputs = (int(n) for n in found.expect(shape, (2,)).raw(0, 2))
        found.expect(packed, (outputs, -(-inputs * bits // 32)))
        integers = Integers(packed, bits, inputs)
    else:
        packed = found.need(module, "weight", ("int8",))
        outputs, inputs = packed.shape
        integers = Integers(packed, 8, inputs, signed=True)
    scales = as_vector(found.need(module, "weight_scale", axes=None))
    order = found.take(module, "weight_g_idx", ("int32",))
    size = _group_size(found, scheme, inputs)
    count = -(-inputs // size)
    if scheme.get("strategy") == "block":
        raise found.refused("weights.strategy", "block", "whole numbers by tensor, channel and group")
    if scales.shape not in ((1,), (outputs,), (outputs, count)) or (
        count > 1 and scales.shape != (outputs, count)
    ):
        raise found.wrong(scales, str([outputs, count]))
    groups, plain = even_groups(inputs, size), True
    if order is not None:
        given = found.expect(order, (inputs,)).raw(0, inputs)
        # Minus one is what the library puts there before it knows.
        if not (given == -1).all() and not np.array_equal(given, groups):
            if given.min() < 0 or given.max() >= count:
                raise BadCheckpoint(
                    f"weight {shown(order.name)} in {order.file.name} names a group that is not there; there are "
                    f"{count:,}. The file is damaged."
                )
            groups, plain = given, False
    zeros = _zeros(found, module, bits, outputs, count, packed=integers.tensor.dtype.name == "int32")
    return IntegerWeight(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=scales.dtype,
        stamp=packed.stamp,
        offset=packed.offset,
        kind=f"compressed-tensors int{bits}" + ("" if plain else ", act-order"),
        calibrated=True,
        integers=integers,
        scales=scales,
        zeros=zeros,
        groups=groups,
        stored_bytes=packed.bytes + scales.bytes + (zeros.tensor.bytes if zeros else 0),
    )


def _group_size(found: QuantizedTensors, scheme: _Scheme, inputs: int) -> int:
    size = scheme.get("group_size")
    if size in (None, -1) or scheme.get("strategy") in ("channel", "tensor"):
        return inputs
    if not is_integer(size) or size < 1:
        raise found.refused("weights.group_size", size, "numbers above 0")
    return int(size)


def _zeros(
    found: QuantizedTensors, module: str, bits: int, outputs: int, count: int, *, packed: bool
) -> Integers | None:
    tensor = found.take(module, "weight_zero_point", ("int32", "int8"))
    if tensor is None:
        return None
    tensor = as_vector(tensor)
    if packed and tensor.dtype.name == "int32":
        found.expect(tensor, (-(-outputs * bits // 32), count))
        return Integers(tensor, bits, count, along=0)
    if tensor.dtype.name != "int8" or tensor.shape != (outputs, count):
        raise found.wrong(tensor, f"{[outputs, count]} in I8")
    return Integers(tensor, 8, count, signed=True)


def _fp8(found: QuantizedTensors, module: str, scheme: _Scheme) -> ScaledWeight:
    if found.take(module, "weight_zero_point", (*FLOATS, "int8", *_FP8)) is not None:
        raise found.refused("weights.symmetric", False, "FP8 without zero points")
    structure: Any = scheme.get("block_structure") if scheme.get("strategy") == "block" else None
    tile = None
    if structure is not None:
        if not (
            isinstance(structure, list)
            and len(structure) == 2
            and all(is_integer(n) and n > 0 for n in structure)
        ):
            raise found.refused("weights.block_structure", structure, "two numbers above 0")
        tile = (structure[0], structure[1])
    elif scheme.get("strategy") not in ("tensor", "channel"):
        raise found.refused("weights.strategy", scheme.get("strategy"), "FP8 by tensor, channel and block")
    return fp8_weight(found, module, "weight_scale", tile, "compressed-tensors FP8")


def _fp4(found: QuantizedTensors, module: str, scheme: _Scheme) -> Fp4Weight:
    packed = found.need(module, "weight_packed", ("uint8",))
    scales = found.need(module, "weight_scale", ("uint8", "e8m0", *_FP8))
    if scheme.get("group_size") == 32:
        return fp4_weight(found, f"{module}.weight", packed, scales, "compressed-tensors MXFP4")
    divisor = as_vector(found.need(module, "weight_global_scale", axes=None))
    found.expect(divisor, (1,))
    return fp4_weight(found, f"{module}.weight", packed, scales, "compressed-tensors NVFP4", divisor=divisor)
