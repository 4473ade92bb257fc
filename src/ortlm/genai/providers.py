"""Execution providers, devices and telemetry of the process."""

from __future__ import annotations

from ortlm.genai.errors import GenaiError, official, text, whole
from ortlm.runtime.engine.session import (
    available_providers,
    register_provider_library,
    unregister_provider_library,
)


def is_cuda_available() -> bool:
    """Whether the installed onnxruntime runs on CUDA."""
    return _has("CUDA")


def is_dml_available() -> bool:
    """Whether the installed onnxruntime runs on DirectML."""
    return _has("Dml")


def is_webgpu_available() -> bool:
    """Whether the installed onnxruntime runs on WebGPU."""
    return _has("WebGpu")


def is_qnn_available() -> bool:
    """Whether the installed onnxruntime runs on Qualcomm's processors."""
    return _has("QNN")


def is_openvino_available() -> bool:
    """Whether the installed onnxruntime runs on OpenVINO."""
    return _has("OpenVINO")


def get_current_gpu_device_id() -> int:
    """Return the number of the GPU that models run on, always 0."""
    return 0


def set_current_gpu_device_id(device_id: int) -> None:
    """Choose the GPU. Raises GenaiError for any but 0."""
    if whole(device_id, "a GPU's number") != 0:
        raise GenaiError(
            f"models run on GPU 0 of those that the process sees, found {device_id}. Choose another one with the "
            "environment variable CUDA_VISIBLE_DEVICES."
        )


@official
def register_execution_provider_library(name: str, path: str) -> None:
    """Let ONNX Runtime load an execution provider from a library."""
    register_provider_library(text(name, "a provider's name"), text(path, "a library's path"))


@official
def unregister_execution_provider_library(name: str) -> None:
    """Undo ``register_execution_provider_library``."""
    unregister_provider_library(text(name, "a provider's name"))


def enable_telemetry_events() -> None:
    """Do nothing: ortlm sends nothing to anybody."""


def disable_telemetry_events() -> None:
    """Do nothing: ortlm sends nothing to anybody."""


def _has(name: str) -> bool:
    return f"{name}ExecutionProvider" in available_providers()
