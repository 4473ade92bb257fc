"""Checkpoints whose weights are quantized already: which formats are read, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.checkpoint import (
    awq,
    bitsandbytes,
    compressed_tensors,
    files,
    fp8,
    gptq,
    modelopt,
    mxfp4,
    olive,
    quark,
)
from ortlm.checkpoint.quantized_tensors import QuantizedTensors
from ortlm.checkpoint.quantized_weight import QuantizedWeight
from ortlm.checkpoint.safetensors import Weight
from ortlm.errors import BadCheckpoint, UnsupportedModel, nearest

_KEY = "quantization_config"
# Files that say how a checkpoint is quantized where config.json does not, and by which method.
_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
# Tensors of which no float checkpoint has any.
_SIGNS = (".qweight", ".weight_packed", ".SCB", ".quant_map", "_blocks", ".weight_scale_inv")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize: what puts its weights together.

    In words, ``reads`` is which of its forms that knows, and ``kept`` in which form builds carry codes over.
    """

    read: Callable[[QuantizedTensors], None]
    reads: str
    kept: str = "dequantized"


def _read_auto_round(found: QuantizedTensors) -> None:
    form = found.config.get("packing_format", "auto_round:gptq")
    if form in ("auto_round:auto_awq", "auto_round:awq"):
        awq.read_awq(found)
    elif form in ("auto_round:auto_gptq", "auto_round:gptq", "auto_round", "auto_round:gptqmodel"):
        gptq.read_words(found, kind="AutoRound", less_one="auto_gptq" in form or form.endswith(":gptq"))
    else:
        raise found.refused(
            "packing_format", form, "auto_round, and auto_round:auto_gptq, gptqmodel and auto_awq"
        )


# By "quant_method".
METHODS: dict[str, Method] = {
    "gptq": Method(gptq.read_gptq, gptq.READS, "carried over; act-order dequantized"),
    "awq": Method(awq.read_awq, awq.READS, "carried over"),
    "auto-round": Method(_read_auto_round, "the layouts of GPTQ and AWQ", "carried over"),
    "compressed-tensors": Method(
        compressed_tensors.read_compressed_tensors,
        compressed_tensors.READS,
        "whole numbers and MXFP4 carried over; act-order, FP8 and NVFP4 dequantized",
    ),
    "fp8": Method(fp8.read_fp8, fp8.READS),
    "fbgemm_fp8": Method(fp8.read_fp8, "FP8 with a scale for each row"),
    "modelopt": Method(modelopt.read_modelopt, modelopt.READS),
    "bitsandbytes": Method(bitsandbytes.read_bitsandbytes, bitsandbytes.READS),
    "mxfp4": Method(mxfp4.read_mxfp4, mxfp4.READS, "carried over, as 8 bits in blocks of 32"),
    "quark": Method(quark.read_quark, quark.READS, "whole numbers and MXFP4 carried over; FP8 dequantized"),
    "olive": Method(olive.read_olive, olive.READS, "carried over"),
}
_SPELLINGS = {"intel/auto-round": "auto-round", "compressed_tensors": "compressed-tensors"}


def read_quantized(
    config: dict[str, Any], weights: dict[str, Weight], folder: Path
) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Return ``config`` without what it says of quantized weights, and the ``weights`` that this makes of tensors.

    Raises UnsupportedModel for a method or a form of it that is not read, BadCheckpoint for tensors that are
    missing, or do not fit what is said of them.
    """
    stated, where, method = _stated(config, folder)
    if stated is None:
        signs = [name for name in weights if name.endswith(_SIGNS)]
        if signs:
            raise BadCheckpoint(
                f"weight {shown(signs[0])} is quantized, and neither config.json nor {', '.join(_FILES)} says "
                "how. Download the checkpoint again, with all of its small files."
            )
        return config, weights
    if method not in METHODS:
        raise UnsupportedModel(
            f"{where} says that the weights are quantized by {shown(method)}, which is not read."
            f"{nearest(method, METHODS)} Read are {', '.join(METHODS)}. Use the original checkpoint, or one "
            "in one of these."
        )
    found = QuantizedTensors(dict(weights), stated, where)
    METHODS[method].read(found)
    if not any(isinstance(weight, QuantizedWeight) for weight in found.tensors.values()):
        raise BadCheckpoint(
            f"{where} says that the weights are quantized by {method}, and none of the checkpoint's tensors is. "
            "If they are float, take that out of the file."
        )
    return {key: value for key, value in config.items() if key != _KEY}, found.tensors


def _stated(config: Mapping[str, Any], folder: Path) -> tuple[Mapping[str, Any] | None, str, str]:
    """Return what is said of the weights, where, and the method's name; None if nothing is."""
    stated = config.get(_KEY)
    if stated is not None:
        where = f'"{_KEY}" in {files.shown(folder / "config.json")}'
        if not isinstance(stated, Mapping):
            raise BadCheckpoint(f"{where} is {shown(stated)}, expected an object.")
        method = str(stated.get("quant_method", "unnamed method"))
        return stated, where, _SPELLINGS.get(method, method)
    for name, method in _FILES.items():
        if files.present(folder, name):
            return files.read_object(folder, name), files.shown(folder / name), method
    return None, "", ""
