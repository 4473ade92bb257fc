"""Checkpoints in FP8, as DeepSeek and Qwen publish them, vLLM, transformers and FBGEMM.

``weight`` is F8_E4M3, ``weight_scale_inv`` (which in spite of its name is a factor) has a number for each block of
128 by 128, ``weight_scale`` one for each row or for all.
"""

from __future__ import annotations

from typing import Any

from ortlm._utils.checked_json import is_integer
from ortlm.checkpoint.quantized_floats import ScaledWeight
from ortlm.checkpoint.quantized_tensors import QuantizedTensors, as_vector
from ortlm.checkpoint.safetensors import FLOATS
from ortlm.dtypes import dtype

READS = "E4M3 and E5M2 with a scale for each block, row or tensor"
_ACTIVATIONS = (
    "input_scale", "activation_scale", "activation_scale_inv", "input_scale_ub", "output_scale", "k_scale",
    "v_scale", "q_scale", "kv_scale",
)  # fmt: skip


def read_fp8(found: QuantizedTensors) -> None:
    """Put together the weights of a checkpoint in FP8."""
    config = found.config
    if config.get("expert_dtype", "fp8") != "fp8":
        raise found.refused("expert_dtype", config["expert_dtype"], "experts in FP8")
    found.drop(*_ACTIVATIONS)
    tile = _tile(found)
    for module in found.modules("weight_scale_inv"):
        single = len(found.tensors[f"{module}.weight_scale_inv"].shape) < 2
        found.add(fp8_weight(found, module, "weight_scale_inv", None if single else tile, "FP8"))
    for module in found.modules("weight_scale"):
        found.add(fp8_weight(found, module, "weight_scale", None, "FP8"))


def fp8_weight(
    found: QuantizedTensors, module: str, part: str, tile: tuple[int, int] | None, kind: str
) -> ScaledWeight:
    """Return the FP8 ``weight`` of ``module`` with scales in ``part``: for each ``tile``, each row, or all."""
    values = found.need(module, "weight", ("fp8_e4m3", "fp8_e5m2"))
    scales = as_vector(found.need(module, part, (*FLOATS, "e8m0"), axes=None))
    outputs, inputs = values.shape
    if tile is not None:
        found.expect(scales, (-(-outputs // tile[0]), -(-inputs // tile[1])))
    elif scales.shape not in ((1,), (1, 1), (outputs,), (outputs, 1)):
        raise found.wrong(scales, f"[1] or [{outputs}, 1]")
    return ScaledWeight(
        name=f"{module}.weight",
        shape=values.shape,
        dtype=scales.dtype if scales.dtype.name in FLOATS else dtype("fp32"),
        stamp=values.stamp,
        offset=values.offset,
        kind=kind,
        calibrated=True,
        values=values,
        scales=scales,
        tile=tile,
    )


def _tile(found: QuantizedTensors) -> tuple[int, int] | None:
    size: Any = found.config.get("weight_block_size")
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2 and all(is_integer(n) and n > 0 for n in size):
        return size[0], size[1]
    raise found.refused("weight_block_size", size, "two numbers above 0")
