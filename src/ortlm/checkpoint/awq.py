"""Checkpoints quantized by AWQ in the layout of AutoAWQ's "gemm" kernels.

AWQ: Lin et al. 2023, arXiv:2306.00978. ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8],
``scales`` [groups, out]. A word holds eight outputs, in an order that its kernels unpack fast.
"""

from __future__ import annotations

from typing import Any

from ortlm._utils.checked_json import is_integer
from ortlm.checkpoint.quantized_integers import Integers, IntegerWeight, even_groups
from ortlm.checkpoint.quantized_tensors import QuantizedTensors

READS = "4 bits, any group size, version gemm"
# Which place in a word each of its eight outputs has.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def read_awq(found: QuantizedTensors) -> None:
    """Put together the weights of an AWQ checkpoint."""
    config = found.config
    bits: Any = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise found.refused("bits", bits, "AWQ in 4 bits")
    version = config.get("version", config.get("checkpoint_format", "gemm"))
    if str(version).lower() != "gemm":
        raise found.refused("version", version, "AWQ in the version gemm")
    if config.get("backend", "autoawq") == "llm-awq":
        raise found.refused("backend", config["backend"], "AWQ as AutoAWQ saves it")
    size: Any = config.get("group_size", config.get("q_group_size", 128))
    if not is_integer(size) or size == 0 or size < -1:
        raise found.refused("group_size", size, "numbers above 0, and -1 for whole rows")
    for module in found.modules("qweight"):
        found.add(_weight(found, module, size))


def _weight(found: QuantizedTensors, module: str, size: int) -> IntegerWeight:
    words = found.need(module, "qweight", ("int32",))
    inputs, outputs = words.shape[0], words.shape[1] * 8
    size = inputs if size == -1 else min(size, inputs)
    count = -(-inputs // size)
    scales = found.expect(found.need(module, "scales"), (count, outputs))
    zeros = found.take(module, "qzeros", ("int32",))
    if zeros is not None:
        found.expect(zeros, (count, outputs // 8))
    return IntegerWeight(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=scales.dtype,
        stamp=words.stamp,
        offset=words.offset,
        kind="AWQ int4",
        calibrated=True,
        integers=Integers(words, 4, inputs, transposed=True, order=ORDER),
        scales=scales,
        scales_transposed=True,
        zeros=None if zeros is None else Integers(zeros, 4, count, transposed=True, order=ORDER),
        groups=even_groups(inputs, size),
        stored_bytes=sum(w.bytes for w in (words, scales, zeros) if w is not None),
    )
