"""Execution providers, devices and telemetry of the process."""

from __future__ import annotations

from ortlm.genai.errors import GenaiError, official, text, whole
from ortlm.runtime.engine.devices import (
    has_device,
    register_provider_library,
    unregister_provider_library,
)

_gpu = 0


def is_cuda_available() -> bool:
    """Whether this machine runs models on CUDA."""
    return _has("CUDA")


def is_dml_available() -> bool:
    """Whether this machine runs models on DirectML."""
    return _has("Dml")


def is_webgpu_available() -> bool:
    """Whether this machine runs models on WebGPU."""
    return _has("WebGpu")


def is_qnn_available() -> bool:
    """Whether this machine runs models on Qualcomm's processors."""
    return _has("QNN")


def is_openvino_available() -> bool:
    """Whether this machine runs models on OpenVINO."""
    return _has("OpenVINO")


def get_current_gpu_device_id() -> int:
    """Return the number of the GPU that models for CUDA are loaded on, 0 unless it was set."""
    return _gpu


def set_current_gpu_device_id(device_id: int) -> None:
    """Load models for CUDA on this GPU from now on, unless their option device_id says another one."""
    global _gpu
    if whole(device_id, "a GPU's number") < 0:
        raise GenaiError(f"a GPU's number is 0 or more, found {device_id}.")
    _gpu = device_id


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
    return has_device(name.lower())
