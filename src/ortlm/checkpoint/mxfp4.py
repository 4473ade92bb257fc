"""Checkpoints in FP4: MXFP4 as GPT-OSS holds its experts, and NVFP4.

MXFP4: Open Compute Project, Microscaling Formats (MX) Specification 1.0. Two numbers of four bits (E2M1) in a
byte, and a power of two for each 32 of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ortlm.checkpoint.quantized_floats import Fp4Weight
from ortlm.checkpoint.quantized_tensors import QuantizedTensors
from ortlm.checkpoint.quantized_weight import QuantizedWeight, TransposedWeight
from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array, dtype

READS = "the experts of GPT-OSS"
_BLOCK, _SHORT_BLOCK = 32, 16


@dataclass(frozen=True, slots=True, eq=False)
class Experts(QuantizedWeight):
    """The matrices of all experts, shape [experts, in, out] as in the checkpoint in bf16.

    They lie there as [out, in].
    """

    stacked: Fp4Weight = field(kw_only=True)

    @property
    def bytes(self) -> int:
        """Size in the file, with scales."""
        return self.stacked.bytes

    def rows(self, start: int, stop: int) -> Array:
        """Return experts [start, stop): float32 [experts, in, out]."""
        _, _, outputs = self.shape
        found = self.stacked.rows(start * outputs, stop * outputs)
        return np.ascontiguousarray(found.reshape(stop - start, outputs, -1).transpose(0, 2, 1))

    def at(self, index: int) -> TransposedWeight:
        """Return the matrix [in, out] of one expert."""
        outputs = self.shape[2]
        return TransposedWeight(
            name=self.name,
            shape=self.shape[1:],
            dtype=self.dtype,
            stamp=self.stamp,
            offset=self.offset,
            kind=self.kind,
            calibrated=True,
            inner=self.stacked.part(self.name, index * outputs, outputs),
        )


def read_mxfp4(found: QuantizedTensors) -> None:
    """Put together the experts of a GPT-OSS checkpoint: ``…_blocks`` and ``…_scales``."""
    for name in [name.removesuffix("_blocks") for name in found.tensors if name.endswith("_blocks")]:
        module, _, part = name.rpartition(".")
        blocks = found.need(module, f"{part}_blocks", ("uint8",), axes=4)
        experts, outputs, count, width = blocks.shape
        scales = found.expect(
            found.need(module, f"{part}_scales", ("uint8", "e8m0"), axes=3), (experts, outputs, count)
        )
        if width * 2 != _BLOCK:
            raise found.wrong(blocks, f"{[experts, outputs, count, _BLOCK // 2]}")
        flat = replace(blocks, shape=(experts * outputs, count * width))
        stacked = fp4_weight(found, name, flat, replace(scales, shape=(experts * outputs, count)), "MXFP4")
        found.add(
            Experts(
                name=name,
                shape=(experts, count * _BLOCK, outputs),
                dtype=dtype("bf16"),
                stamp=blocks.stamp,
                offset=blocks.offset,
                kind="MXFP4",
                calibrated=True,
                stacked=stacked,
            )
        )


def fp4_weight(
    found: QuantizedTensors,
    name: str,
    packed: Weight,
    scales: Weight,
    kind: str,
    *,
    divisor: Weight | None = None,
    factor: Weight | None = None,
) -> Fp4Weight:
    """Return the weight ``name`` in FP4.

    Each 32 numbers have a power of two, or, with ``divisor`` or ``factor``, each 16 a number in FP8.
    """
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    powers = divisor is None and factor is None
    block = _BLOCK if powers else _SHORT_BLOCK
    if inputs % block:
        raise found.wrong(packed, f"rows of whole blocks of {block // 2} bytes")
    found.expect(scales, (outputs, inputs // block))
    return Fp4Weight(
        name=name,
        shape=(outputs, inputs),
        dtype=dtype("bf16"),
        stamp=packed.stamp,
        offset=packed.offset,
        kind=kind,
        calibrated=True,
        packed=packed,
        scales=scales,
        block=block,
        powers=powers,
        divisor=divisor,
        factor=factor,
    )
