"""What is known of each kind of device, as data: its names, its execution provider, its options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.errors import BadOption, nearest

_MOST = (1 << 63) - 1
_SUFFIX = "executionprovider"


@dataclass(frozen=True, slots=True)
class Option:
    """What an option of an execution provider takes: ``expected`` in words, and ``read``.

    ``read`` returns the text for ONNX Runtime, or None for a value that it does not take.
    """

    expected: str
    read: Callable[[str], str | None]


def _flag() -> Option:
    return Option("0 or 1", {"0": "0", "1": "1", "false": "0", "true": "1", "False": "0", "True": "1"}.get)


def _integer(least: int = 0) -> Option:
    def read(value: str) -> str | None:
        digits = value.isascii() and value.isdigit() and len(value) < 20
        return value if digits and least <= int(value) <= _MOST else None

    return Option(f"a whole number from {least} on", read)


def _one_of(*allowed: str) -> Option:
    return Option(f"one of {', '.join(allowed)}", lambda value: value if value in allowed else None)


def _text() -> Option:
    return Option("a text", lambda value: value or None)


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device: ``name`` as users type it, ``provider`` as ONNX Runtime calls it.

    ``title`` says what it is. ``install`` is what ``pip install`` takes to bring the provider, None where nothing
    is to be installed. ``module`` is the Python package of a plugin. ``number`` is the option by which a provider
    that is built into ONNX Runtime takes the number of a device; without it there is only one to name.
    ``options`` are those that are known; further ones go through unchecked if ``open_options``. ``refused`` are
    options that would break a run here, with the reason. ``picks_itself``: the provider chooses among the
    machine's GPUs by itself, so that none can be named. ``systems``: where it exists, as ``sys.platform`` says.
    ``attention_ignores`` is what its GroupQueryAttention passes over without a word, by the names in
    ``check_attention``. ``appends_one``: several tokens of a row at once are right in an empty cache only.
    ``constant_defaults``: it takes no graph with inputs that have a default value. ``defaults`` are options that
    are set unless a caller does, by the type of the device ("cpu"). ``capture`` is the option that lets runs be
    captured, which is set where that was tried.
    """

    name: str
    provider: str
    title: str
    install: str | None = None
    module: str | None = None
    number: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    open_options: bool = False
    picks_itself: bool = False
    systems: tuple[str, ...] = ()
    attention_ignores: frozenset[str] = frozenset()
    appends_one: bool = False
    constant_defaults: bool = False
    defaults: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    capture: str | None = None


# Harmless when off.
_CAPTURED = "runs are not captured as graphs there: that was never tried"
_POINTER = "it is an address within a C program"
_CACHE_MODE = _one_of("disabled", "lazyRelease", "simple", "bucket")

KINDS: Mapping[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind("cpu", "CPUExecutionProvider", "processor"),
        DeviceKind(
            "cuda",
            "CUDAExecutionProvider",
            "NVIDIA GPU (CUDA)",
            install="onnxruntime-gpu[cuda,cudnn]",
            module="onnxruntime_ep_cuda",
            number="device_id",
            capture="enable_cuda_graph",
            systems=("linux", "win32"),
            options={
                "device_id": _integer(),
                "gpu_mem_limit": _integer(1),
                "arena_extend_strategy": _one_of("kNextPowerOfTwo", "kSameAsRequested"),
                "cudnn_conv_algo_search": _one_of("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
                "cudnn_conv_use_max_workspace": _flag(),
                "cudnn_conv1d_pad_to_nc1d": _flag(),
                "do_copy_in_default_stream": _flag(),
                "enable_cuda_graph": _flag(),
                "enable_skip_layer_norm_strict_mode": _flag(),
                "fuse_conv_bias": _flag(),
                "prefer_nhwc": _flag(),
                "sdpa_kernel": _integer(),
                "tunable_op_enable": _flag(),
                "tunable_op_tuning_enable": _flag(),
                "tunable_op_max_tuning_duration_ms": _integer(),
                "use_ep_level_unified_stream": _flag(),
                "use_tf32": _flag(),
            },
            refused={
                "has_user_compute_stream": _POINTER,
                "user_compute_stream": _POINTER,
                "gpu_external_alloc": _POINTER,
                "gpu_external_free": _POINTER,
                "gpu_external_empty_cache": _POINTER,
            },
        ),
        DeviceKind(
            "dml",
            "DmlExecutionProvider",
            "DirectX 12 GPU (DirectML)",
            install="onnxruntime-directml",
            number="device_id",
            systems=("win32",),
            # Read in the source of 1.24.4: of more than one token, it takes the cache for empty.
            attention_ignores=frozenset({"softcap", "window", "rotation", "eviction"}),
            appends_one=True,
            options={
                "device_id": _integer(),
                "disable_metacommands": _flag(),
                "enable_dynamic_graph_fusion": _flag(),
                "performance_preference": _one_of("default", "high_performance", "minimum_power"),
                "device_filter": _one_of("gpu", "npu", "any"),
            },
            refused={"enable_graph_capture": _CAPTURED},
        ),
        DeviceKind(
            "webgpu",
            "WebGpuExecutionProvider",
            "GPU (WebGPU)",
            install="onnxruntime-ep-webgpu",
            module="onnxruntime_ep_webgpu",
            picks_itself=True,
            attention_ignores=frozenset({"softcap", "positions", "eviction"}),
            options={
                "dawnBackendType": _one_of("D3D12", "Vulkan"),
                "defaultBufferCacheMode": _CACHE_MODE,
                "enableInt64": _flag(),
                "enablePIXCapture": _flag(),
                "enableRobustness": _flag(),
                "forceCpuNodeNames": _text(),
                "maxNumPendingDispatches": _integer(1),
                "maxStorageBufferBindingSize": _integer(1),
                "multiRotaryCacheConcatOffset": _integer(),
                "powerPreference": _one_of("high-performance", "low-power"),
                "preferredLayout": _one_of("NCHW", "NHWC"),
                "preserveDevice": _flag(),
                "queryResolveBufferCacheMode": _CACHE_MODE,
                "sessionBufferPoolGenerations": _integer(),
                "storageBufferCacheMode": _CACHE_MODE,
                "uniformBufferCacheMode": _CACHE_MODE,
                "validationMode": _one_of("disabled", "wgpuOnly", "basic", "full"),
            },
            refused={
                "enableGraphCapture": _CAPTURED,
                "kvCacheQuantizationBits": "it changes the layout of a cache that is made here",
                "dawnProcTable": _POINTER,
                "deviceId": _POINTER,
                "webgpuDevice": _POINTER,
                "webgpuInstance": _POINTER,
            },
        ),
        DeviceKind(
            "openvino",
            "OpenVINOExecutionProvider",
            "Intel processor, GPU or NPU (OpenVINO)",
            install="onnxruntime-ep-openvino",
            module="onnxruntime_ep_openvino",
            systems=("linux", "win32"),
            # Not tried: a cache that holds a window only.
            attention_ignores=frozenset({"eviction"}),
            # "input has no ONNX binding" otherwise.
            constant_defaults=True,
            # Else it computes in bf16 where the processor can, and logits are off by 1 to 10 %.
            defaults={"cpu": {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'}},
            # Other names pass the plugin (1.8.1) without an effect or an error.
            options={"load_config": _text()},
            refused={
                "device_type": "the device is chosen by its name, as openvino:gpu",
                "enable_causallm": "it keeps the cache inside the graph, out of reach of rewinding and batches",
                "reshape_input": "shapes change with every prompt",
            },
        ),
        DeviceKind(
            "qnn",
            "QNNExecutionProvider",
            "Qualcomm NPU",
            install="onnxruntime-qnn",
            module="onnxruntime_qnn",
            open_options=True,
            systems=("win32", "linux"),
        ),
        DeviceKind(
            "nvtensorrtrtx",
            "NvTensorRTRTXExecutionProvider",
            "NVIDIA RTX GPU (TensorRT)",
            install="onnxruntime-ep-nv-tensorrt-rtx",
            module="onnxruntime_ep_nv_tensorrt_rtx",
            refused={"enable_cuda_graph": _CAPTURED},
            open_options=True,
            systems=("linux", "win32"),
        ),
        DeviceKind(
            "mlx",
            "MLXExecutionProvider",
            "Apple GPU (MLX)",
            install="onnxruntime-ep-mlx",
            module="onnxruntime_ep_mlx",
            open_options=True,
            systems=("darwin",),
        ),
    )
}

# Other names that users of peers type.
_ALIASES = {"directml": "dml", "trt-rtx": "nvtensorrtrtx", "gpu": "cuda", "web": "webgpu"}
# What onnxruntime lists and is no device of this machine.
NO_DEVICES = ("AzureExecutionProvider",)
DEVICE_TYPES = ("cpu", "gpu", "npu")
_NAME = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)(?::(.*))?", re.DOTALL)
_LIBRARY = re.compile(r"(.*\.(?:so|dll|dylib)(?:\.[0-9.]+)?)(?::(.*))?", re.DOTALL)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A device as it was asked for: the kind's short name in lower case, or the path of a provider's library.

    ``which`` is what stands after the colon: a number, or a type of device such as "gpu"; None for nothing.
    ``filters`` are what one of a plugin's devices has to be, by DeviceRequest.
    """

    name: str
    which: str | None = None
    library: str | None = None
    filters: Mapping[str, str | int] = field(default_factory=dict)

    def __str__(self) -> str:
        return (self.library or self.name) + ("" if self.which is None else f":{self.which}")


def short_name(provider: str) -> str:
    """Return "cuda" for "CUDAExecutionProvider", "CUDA" or "cuda"."""
    return provider.lower().removesuffix(_SUFFIX)


def parse_device(text: Any, *, known: Sequence[str] = (), library: bool = True) -> Wanted:
    """Read "cuda", "cuda:1", "openvino:npu", "CUDAExecutionProvider", or the path of a provider's library.

    ``known`` are further kinds that this machine has, by short names; a path is taken with ``library`` only.
    What stands after the colon has to fit the kind, whether this machine has such a device or not.
    Raises BadOption, with the nearest name, for anything else.
    """
    if library and isinstance(text, str) and len(text) < 4096 and (found := _LIBRARY.fullmatch(text)):
        return _checked(Wanted("", found[2], found[1]))
    match = _NAME.fullmatch(text) if isinstance(text, str) and len(text) < 200 else None
    name = short_name(match[1]) if match else ""
    if match is None or name not in {*KINDS, *known, *_ALIASES}:
        there = dict.fromkeys((*KINDS, *known))
        meant = nearest(name or str(text)[:50].lower(), [*there, *_ALIASES])
        raise BadOption(
            f"there is no device {shown(text)}; there are {', '.join(there)}, with a number after a colon where "
            f"there are several, as cuda:1.{meant}"
        )
    if name in _ALIASES and name not in known:
        meant = _ALIASES[name]
        device = _checked(Wanted(meant, match[2]))
        if name != "trt-rtx":
            raise BadOption(f"there is no device {match[0]!r}. Did you mean: {device}?")
        return device
    return _checked(Wanted(name, match[2]))


def _checked(wanted: Wanted) -> Wanted:
    """Return ``wanted`` if there can be such a device somewhere; raises BadOption."""
    which, kind = wanted.which, KINDS.get(wanted.name)
    if which is None:
        return wanted
    if kind is not None and kind.name == "cpu":
        if which == "0":
            return wanted
        raise BadOption(f"there is one CPU, found {shown(str(wanted))}. Say cpu.")
    if kind is not None and kind.picks_itself:
        if which == "0":
            return wanted
        raise BadOption(
            f"{shown(str(wanted))} cannot be chosen: the provider picks among the machine's GPUs by itself. Say "
            f"{kind.name}; option powerPreference=low-power or high-performance says which kind of GPU."
        )
    numbers_only = kind is not None and kind.number is not None
    if _NUMBER.fullmatch(which) or (not numbers_only and which.lower() in DEVICE_TYPES):
        return wanted
    name = wanted.library or wanted.name
    types = "" if numbers_only else f" or a type of device ({', '.join(DEVICE_TYPES)})"
    raise BadOption(
        f"{shown(str(wanted))} names no device: after the colon stands a number from 0 on{types}, as {name}:0, "
        f"found {shown(which)}."
    )


def check_options(kind: DeviceKind, given: Mapping[str, Any]) -> dict[str, str]:
    """Return the options ``given`` for devices of a kind as ONNX Runtime takes them.

    Raises BadOption, by name, for one that is not known, is refused, or has a value that it does not take.
    """
    checked = {}
    for key, value in given.items():
        text = _written(value)
        if key in kind.refused:
            if text.lower() not in ("", "0", "false"):
                raise BadOption(
                    f"option {key}={shown(text)} of device {kind.name} is not supported: {kind.refused[key]}. "
                    "Leave it out."
                )
            continue
        if kind.name == "cpu":
            raise BadOption(
                f"the execution provider for the CPU has no options, found {shown(key)}. Leave it out."
            )
        option = kind.options.get(key)
        if option is None and not kind.open_options:
            raise BadOption(
                f"device {kind.name} has no option {shown(key)}; it has {', '.join(kind.options) or 'none'}."
                + nearest(key, kind.options)
            )
        read = text if option is None else option.read(text)
        if read is None:
            assert option is not None
            raise BadOption(
                f"option {key} of device {kind.name} takes {option.expected}, found {shown(text)}."
            )
        checked[key] = read
    return checked


def without_capture(options: Mapping[str, str]) -> dict[str, str]:
    """Return the options that a folder names without those that only ask for faster, captured runs."""
    captures = {key for kind in KINDS.values() for key, why in kind.refused.items() if why == _CAPTURED}
    captures |= {kind.capture for kind in KINDS.values() if kind.capture}
    return {key: value for key, value in options.items() if key not in captures}


def _written(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
