"""Checkpoints quantized by AWQ in the layout of AutoAWQ's "gemm" kernels.

AWQ: Lin et al. 2023, arXiv:2306.00978. ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8],
``scales`` [groups, out]. A word holds eight outputs, in an order that its kernels unpack fast.
"""

from __future__ import annotations

from typing import Any

from ortlm._utils.checked_json import is_integer
from ortlm.checkpoint.quantized_integers import Integers, IntegerWeight, even_groups
from ortlm.checkpoint.quantized_tensors import QuantizedTensors
from ortlm.checkpoint.safetensors import Weight

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
        found.add(int4_weight(found, module, size, "AWQ int4"))


def int4_weight(
    found: QuantizedTensors,
    module: str,
    size: int,
    kind: str,
    *,
    names: tuple[str, str, str] = ("qweight", "scales", "qzeros"),
    order: tuple[int, ...] | None = ORDER,
    signed: bool = False,
) -> IntegerWeight:
    """Return the weight of ``module`` in 4 bits with groups of ``size`` inputs, -1 for whole rows.

    ``names`` are those of its words, scales and zeros; ``order`` and ``signed`` as in Integers.
    """
    words = found.need(module, names[0], ("int32",))
    inputs, outputs = words.shape[0], words.shape[1] * 8
    size = inputs if size == -1 else min(size, inputs)
    count = -(-inputs // size)
    scales = found.expect(found.need(module, names[1]), (count, outputs))
    zeros = found.take(module, names[2], ("int32",))
    if zeros is not None:
        found.expect(zeros, (count, outputs // 8))

    def numbers(tensor: Weight, of: int) -> Integers:
        return Integers(tensor, 4, of, transposed=True, order=order, signed=signed)

    return IntegerWeight(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=scales.dtype,
        stamp=words.stamp,
        offset=words.offset,
        kind=kind,
        calibrated=True,
        integers=numbers(words, inputs),
        scales=scales,
        scales_transposed=True,
        zeros=None if zeros is None else numbers(zeros, count),
        groups=even_groups(inputs, size),
        stored_bytes=sum(w.bytes for w in (words, scales, zeros) if w is not None),
    )
