"""The Python API of onnxruntime-genai over ortlm's runtime.

    import ortlm.genai as og

Programs for the official runtime run as they are; docs/genai.md tells what differs.
"""

from __future__ import annotations

from ortlm._version import __version__
from ortlm.genai.adapters import Adapters
from ortlm.genai.config import Config
from ortlm.genai.errors import GenaiError
from ortlm.genai.generator import Generator
from ortlm.genai.log import set_log_callback, set_log_options
from ortlm.genai.media import Audios, Images
from ortlm.genai.model import Model
from ortlm.genai.params import GeneratorParams
from ortlm.genai.processor import MultiModalProcessor
from ortlm.genai.providers import (
    disable_telemetry_events,
    enable_telemetry_events,
    get_current_gpu_device_id,
    is_cuda_available,
    is_dml_available,
    is_openvino_available,
    is_qnn_available,
    is_webgpu_available,
    register_execution_provider_library,
    set_current_gpu_device_id,
    unregister_execution_provider_library,
)
from ortlm.genai.tensors import ElementType, NamedTensors, Tensor
from ortlm.genai.tokenizer import Tokenizer, TokenizerStream

__id__ = "ortlm"
__commit__ = ""

__all__ = [
    "Adapters",
    "Audios",
    "Config",
    "ElementType",
    "GenaiError",
    "Generator",
    "GeneratorParams",
    "Images",
    "Model",
    "MultiModalProcessor",
    "NamedTensors",
    "Tensor",
    "Tokenizer",
    "TokenizerStream",
    "__version__",
    "disable_telemetry_events",
    "enable_telemetry_events",
    "get_current_gpu_device_id",
    "is_cuda_available",
    "is_dml_available",
    "is_openvino_available",
    "is_qnn_available",
    "is_webgpu_available",
    "register_execution_provider_library",
    "set_current_gpu_device_id",
    "set_log_callback",
    "set_log_options",
    "unregister_execution_provider_library",
]
_ENGINE = "continuous batching; use ortlm.load(...).generate_batch"
# What the official module has, and why this one does not.
ABSENT = {
    **dict.fromkeys(
        (
            "Engine",
            "EngineCapabilities",
            "EngineErrorCode",
            "EngineEvent",
            "EngineEventBuffer",
            "EngineEventFlags",
            "FinishReason",
            "Request",
            "RequestOptions",
            "TurnOptions",
            "TurnUsage",
        ),
        _ENGINE,
    ),
    "MtpGenerator": "multi-token prediction",
    "StreamingProcessor": "models of speech",
}


def __getattr__(name: str) -> object:
    hint = f": {ABSENT[name]}" if name in ABSENT else ""
    raise AttributeError(f"ortlm.genai has no {name!r}{hint}")
