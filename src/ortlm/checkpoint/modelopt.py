"""Checkpoints of NVIDIA's TensorRT Model Optimizer: FP8 and NVFP4."""

from __future__ import annotations

from typing import Any

from ortlm.checkpoint.fp8 import fp8_weight
from ortlm.checkpoint.mxfp4 import fp4_weight
from ortlm.checkpoint.quantized_tensors import QuantizedTensors, as_vector

READS = "FP8 and NVFP4"
_ACTIVATIONS = (
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "k_proj.k_scale",
    "v_proj.v_scale",
)


def read_modelopt(found: QuantizedTensors) -> None:
    """Put together the weights of a checkpoint of Model Optimizer."""
    # In hf_quant_config.json it stands one level deeper.
    inner: Any = found.config.get("quantization", found.config)
    method = inner.get("quant_algo") if isinstance(inner, dict) else None
    if method not in ("FP8", "NVFP4"):
        raise found.refused("quant_algo", method, READS)
    found.drop(*_ACTIVATIONS)
    for module in found.modules("weight_scale"):
        if found.dtype(module, "weight") == "uint8":
            packed = found.need(module, "weight", ("uint8",))
            scales = found.need(module, "weight_scale", ("fp8_e4m3",))
            factor = found.expect(as_vector(found.need(module, "weight_scale_2", ("fp32",), axes=None)), (1,))
            name = f"{module}.weight"
            found.add(fp4_weight(found, name, packed, scales, "ModelOpt NVFP4", factor=factor))
        else:
            found.add(fp8_weight(found, module, "weight_scale", None, "ModelOpt FP8"))
