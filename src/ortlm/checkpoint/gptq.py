"""Checkpoints quantized by GPTQ, as AutoGPTQ, GPTQModel, AutoRound and Intel's tools save them.

GPTQ: Frantar et al. 2022, arXiv:2210.17323. The layout is GPTQModel's: ``qweight`` int32 [in · bits / 32, out],
``qzeros`` int32 [groups, out · bits / 32], ``scales`` [groups, out], ``g_idx`` int32 [in]: the group of an input.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ortlm._utils.checked_json import is_integer, shown
from ortlm.checkpoint.quantized_integers import Integers, IntegerWeight, even_groups
from ortlm.checkpoint.quantized_tensors import QuantizedTensors
from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array
from ortlm.errors import BadCheckpoint

READS = "2, 4 and 8 bits, any group size, zero points and act-order, formats gptq and gptq_v2"
_BITS = (2, 4, 8)
# The first format holds zeros that are less by one. GPTQModel takes that off whole words, carries included.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def read_gptq(found: QuantizedTensors) -> None:
    """Put together the weights of a GPTQ checkpoint."""
    config = found.config
    form = config.get("checkpoint_format", config.get("format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise found.refused("checkpoint_format", form, "gptq and gptq_v2")
    if config.get("pack_dtype", "int32") != "int32":
        raise found.refused("pack_dtype", config["pack_dtype"], "int32")
    read_words(found, kind="GPTQ", less_one=form == "gptq")


def read_words(found: QuantizedTensors, *, kind: str, less_one: bool) -> None:
    """Put together weights that lie as GPTQ's; ``less_one``: zeros are stored less by one."""
    for module in found.modules("qweight"):
        found.add(_weight(found, module, kind, less_one))


def _weight(found: QuantizedTensors, module: str, kind: str, less_one: bool) -> IntegerWeight:
    words = found.need(module, "qweight", ("int32",))
    scales = found.need(module, "scales")
    zeros = found.need(module, "qzeros", ("int32",))
    order = None
    if found.dtype(module, "g_idx") is not None:
        order = found.need(module, "g_idx", ("int32",), axes=1)
    count, outputs = scales.shape
    if words.shape[1] != outputs:
        raise found.wrong(words, f"{outputs} columns, as many as {shown(scales.name)}")
    bits = _bits(found, module, words, order)
    inputs = words.shape[0] * 32 // bits
    found.expect(zeros, (count, -(-outputs * bits // 32)))
    groups = _groups(found, module, order, inputs, count)
    plain = np.array_equal(groups, even_groups(inputs, -(-inputs // count)))
    return IntegerWeight(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=scales.dtype,
        stamp=words.stamp,
        offset=words.offset,
        kind=f"{kind} int{bits}" + ("" if plain else ", act-order"),
        calibrated=True,
        integers=Integers(words, bits, inputs, along=0, transposed=True),
        scales=scales,
        scales_transposed=True,
        zeros=Integers(zeros, bits, count, transposed=True, plus=_ONES[bits] if less_one else 0),
        groups=groups,
        stored_bytes=sum(w.bytes for w in (words, scales, zeros)),
    )


def _bits(found: QuantizedTensors, module: str, words: Weight, order: Weight | None) -> int:
    """Return the width of a module's codes: some configurations give some modules another than the rest."""
    stated: Any = found.config.get("bits", 4)
    if not is_integer(stated) or stated not in _BITS:
        raise found.refused("bits", stated, "2, 4 and 8")
    if order is None:
        return int(stated)
    bits = words.shape[0] * 32 / order.shape[0]
    if bits not in _BITS or (bits != stated and not _exceptions(found)):
        raise found.wrong(
            words, f"{order.shape[0] * stated // 32} rows: {order.shape[0]:,} inputs of {stated} bits"
        )
    return int(bits)


def _exceptions(found: QuantizedTensors) -> bool:
    return any(found.config.get(key) for key in ("dynamic", "extra_config"))


def _groups(found: QuantizedTensors, module: str, order: Weight | None, inputs: int, count: int) -> Array:
    """Return the group of each input."""
    size: Any = found.config.get("group_size", -1)
    if not is_integer(size) or size == 0 or size < -1:
        raise found.refused("group_size", size, "numbers above 0, and -1 for whole rows")
    size = -(-inputs // count) if _exceptions(found) else inputs if size == -1 else min(size, inputs)
    if -(-inputs // size) != count:
        raise BadCheckpoint(
            f"weight {shown(f'{module}.scales')} has {count:,} groups; {found.where} implies "
            f"{-(-inputs // size):,} for {inputs:,} inputs in groups of {size:,}. One of the two belongs to "
            "another checkpoint."
        )
    even = even_groups(inputs, size)
    if order is None:
        return even
    given: Array = found.expect(order, (inputs,)).raw(0, inputs)
    if np.array_equal(given, even) or (not given.any() and not found.config.get("desc_act")):
        return even
    if given.min() < 0 or given.max() >= count:
        raise BadCheckpoint(
            f"weight {shown(order.name)} in {order.file.name} names the group "
            f"{given.max() if given.max() >= count else given.min():,}; there are {count:,}. The file is damaged."
        )
    return given
