"""Checkpoints of bitsandbytes: NF4 and FP4 in blocks, and LLM.int8().

QLoRA: Dettmers et al. 2023, arXiv:2305.14314; LLM.int8(): arXiv:2208.07339. Neither is a uniform grid of blocks of
a row: NF4 has a table of values, its blocks count through the whole matrix, and scales may be in codes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ortlm._utils.checked_json import check, integer, list_of, number, one_of, parse_object
from ortlm.checkpoint.quantized_tensors import QuantizedTensors, as_vector
from ortlm.checkpoint.quantized_weight import QuantizedWeight
from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array, Floats, dtype
from ortlm.errors import BadCheckpoint

READS = "NF4 and FP4, with and without double quantization, and LLM.int8()"
_STATE = "weight.quant_state.bitsandbytes__"
_MOST_STATE_BYTES = 4096
_MOST = 1 << 40
_LEVELS, _NESTED_LEVELS = 16, 256
# What bitsandbytes multiplies codes of LLM.int8() by, besides the largest value of the row.
_INT8 = np.float32(7.874015718698502e-3)
_FIELDS = {
    "quant_type": one_of("nf4", "fp4"),
    "blocksize": integer(1, 1 << 20),
    "shape": list_of(integer(1, _MOST), least=2, most=2),
    "nested_blocksize": integer(1, 1 << 20, default=None),
    "nested_offset": number(default=0.0),
}


@dataclass(frozen=True, slots=True, eq=False)
class TableWeight(QuantizedWeight):
    """table[code] · scale: two codes in a byte of ``packed``, the first in the upper half.

    Numbers of the whole matrix are counted through, and each ``block`` of them has a scale in ``scales``: a
    number, or a code for ``nested``: a table and scales of its own, each for ``nested_block`` codes, and ``mean``
    is added.
    """

    packed: Weight = field(kw_only=True)
    table: Weight = field(kw_only=True)
    scales: Weight = field(kw_only=True)
    block: int = field(kw_only=True)
    nested: tuple[Weight, Weight] | None = None
    nested_block: int = 256
    mean: float = 0.0

    @property
    def bytes(self) -> int:
        """Size in the file, with scales."""
        parts = (self.packed, self.table, self.scales, *(self.nested or ()))
        return sum(part.bytes for part in parts)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), dequantized, as float32."""
        width = self.shape[1]
        first, last = start * width, stop * width
        packed = self.packed.raw(first // 2, -(-last // 2)).reshape(-1)
        both = np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=-1).reshape(-1)
        values = self.table.rows(0, _LEVELS)[both[first % 2 : first % 2 + last - first]]
        low, high = first // self.block, -(-last // self.block)
        scales = np.repeat(self._scales(low, high), self.block)
        with np.errstate(over="ignore", invalid="ignore"):
            values = values * scales[first - low * self.block : last - low * self.block]
        return np.asarray(values, np.float32).reshape(stop - start, width)

    def _scales(self, low: int, high: int) -> Floats:
        if self.nested is None:
            return np.asarray(self.scales.rows(low, high), np.float32)
        table, outer = self.nested
        codes = self.scales.raw(low, high)
        first, last = low // self.nested_block, -(-high // self.nested_block)
        theirs = np.repeat(outer.rows(first, last), self.nested_block)
        theirs = theirs[low - first * self.nested_block : high - first * self.nested_block]
        return np.asarray(table.rows(0, _NESTED_LEVELS)[codes] * theirs + np.float32(self.mean), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight(QuantizedWeight):
    """code · largest / 127, with the largest value of each row."""

    values: Weight = field(kw_only=True)
    largest: Weight = field(kw_only=True)

    @property
    def bytes(self) -> int:
        """Size in the file, with scales."""
        return self.values.bytes + self.largest.bytes

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), dequantized, as float32."""
        return np.asarray(
            self.values.rows(start, stop) * self.largest.rows(start, stop)[:, None] * _INT8, np.float32
        )


def read_bitsandbytes(found: QuantizedTensors) -> None:
    """Put together the weights of a checkpoint of bitsandbytes."""
    for part in ("nf4", "fp4"):
        for module in found.modules(f"{_STATE}{part}"):
            found.add(_table_weight(found, module, part))
    for module in found.modules("SCB"):
        found.take(module, "weight_format", ("uint8",))
        values = found.need(module, "weight", ("int8",))
        largest = found.expect(found.need(module, "SCB", ("fp32",), axes=1), values.shape[:1])
        found.add(
            Int8Weight(
                name=f"{module}.weight",
                shape=values.shape,
                dtype=dtype("fp32"),
                stamp=values.stamp,
                offset=values.offset,
                kind="bitsandbytes int8",
                values=values,
                largest=largest,
            )
        )


def _table_weight(found: QuantizedTensors, module: str, part: str) -> TableWeight:
    state = _state(found, module, part)
    outputs, inputs = state["shape"]
    count = outputs * inputs
    packed = found.need(module, "weight", ("uint8",), axes=None)
    if packed.shape not in ((-(-count // 2), 1), (1, -(-count // 2))):
        raise found.wrong(packed, f"{[-(-count // 2), 1]}")
    packed = replace(packed, shape=(-(-count // 2),))
    blocks = -(-count // state["blocksize"])
    table = found.expect(found.need(module, "weight.quant_map", ("fp32",), axes=1), (_LEVELS,))
    scales = found.expect(
        as_vector(found.need(module, "weight.absmax", ("fp32", "uint8"), axes=None)), (blocks,)
    )
    nested, size = None, state["nested_blocksize"]
    if scales.dtype.name == "uint8":
        if size is None:
            raise BadCheckpoint(
                f"weight {scales.name!r} in {scales.file.name} holds codes, and the state of its weight has no "
                "nested_blocksize. The file is damaged."
            )
        nested = (
            found.expect(found.need(module, "weight.nested_quant_map", ("fp32",), axes=1), (_NESTED_LEVELS,)),
            found.expect(
                found.need(module, "weight.nested_absmax", ("fp32",), axes=1), (-(-blocks // size),)
            ),
        )
    return TableWeight(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=dtype("fp32"),
        stamp=packed.stamp,
        offset=packed.offset,
        kind=f"bitsandbytes {state['quant_type']}" + (", double quantization" if nested else ""),
        packed=packed,
        table=table,
        scales=scales,
        block=state["blocksize"],
        nested=nested,
        nested_block=size or 1,
        mean=state["nested_offset"],
    )


def _state(found: QuantizedTensors, module: str, part: str) -> dict[str, Any]:
    """Return what a tensor of bytes says of a weight, which is JSON."""
    tensor = found.need(module, f"{_STATE}{part}", ("uint8",), axes=1)
    where = f"weight {tensor.name!r} in {tensor.file.name}"
    if tensor.shape[0] > _MOST_STATE_BYTES:
        raise BadCheckpoint(f"{where} has {tensor.shape[0]:,} bytes; expected at most {_MOST_STATE_BYTES:,}.")
    raw = tensor.raw(0, tensor.shape[0]).tobytes()
    return check(
        parse_object(raw.decode(errors="replace"), where=where, error=BadCheckpoint),
        _FIELDS,
        file=where,
        error=BadCheckpoint,
    )
