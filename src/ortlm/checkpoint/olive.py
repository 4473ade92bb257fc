"""Checkpoints that Olive quantized: bytes [out, in · bits / 8], and everything else in rows of the matrix too."""

from __future__ import annotations

from ortlm.checkpoint.quantized_integers import Integers, IntegerWeight, even_groups
from ortlm.checkpoint.quantized_tensors import QuantizedTensors

READS = "2, 4 and 8 bits, in groups and whole rows"
_BITS = (2, 4, 8)


def read_olive(found: QuantizedTensors) -> None:
    """Put together the weights of a checkpoint of Olive."""
    overrides = found.config.get("overrides") or {}
    for module in found.modules("qweight"):
        own = overrides.get(module, {}) if isinstance(overrides, dict) else {}
        stated = {**found.config, **(own if isinstance(own, dict) else {})}
        bits, size = stated.get("bits"), stated.get("group_size", -1)
        if bits not in _BITS or not isinstance(bits, int):
            raise found.refused("bits", bits, "2, 4 and 8")
        packed = found.need(module, "qweight", ("uint8",))
        outputs, inputs = packed.shape[0], packed.shape[1] * 8 // bits
        scales = found.need(module, "scales")
        count = scales.shape[1]
        found.expect(scales, (outputs, count))
        if not isinstance(size, int) or inputs != count * (size if size > 0 else inputs):
            raise found.wrong(scales, f"one scale for each group of {size}")
        zeros = found.take(module, "qzeros", ("uint8",))
        if zeros is not None:
            found.expect(zeros, (outputs, -(-count * bits // 8)))
        found.add(
            IntegerWeight(
                name=f"{module}.weight",
                shape=(outputs, inputs),
                dtype=scales.dtype,
                stamp=packed.stamp,
                offset=packed.offset,
                kind=f"Olive int{bits}",
                calibrated=True,
                integers=Integers(packed, bits, inputs),
                scales=scales,
                zeros=None if zeros is None else Integers(zeros, bits, count),
                groups=even_groups(inputs, inputs // count),
                stored_bytes=packed.bytes + scales.bytes + (zeros.bytes if zeros else 0),
            )
        )
