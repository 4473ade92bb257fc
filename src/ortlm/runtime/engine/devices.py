"""The devices of this machine: which there are, and how exactly one of them is chosen and handed to a session.

Built-in execution providers go by name; plugins are libraries that are registered, and give a list of devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnxruntime

from ortlm._utils.formatting import one_line
from ortlm.errors import BadOption, NoDevice
from ortlm.runtime.engine.device_kinds import (
    KINDS,
    NO_DEVICES,
    DeviceKind,
    Wanted,
    check_options,
    parse_device,
    short_name,
    without_capture,
)

CPU_PROVIDER = "CPUExecutionProvider"
_NVIDIA = 0x10DE  # as PCI numbers vendors
# The packages that each hold a whole onnxruntime; the last one installed replaces the files of the others.
_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-webgpu",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
)


@dataclass(frozen=True, slots=True)
class Device:
    """The one device that a session computes on.

    ``kind`` is its short name, ``name`` that with a number if one was named ("cuda:1"), ``index`` its number.
    ``provider`` and ``options`` are as ONNX Runtime takes them. ``ep_device`` is ONNX Runtime's OrtEpDevice for
    plugins, None for a provider that goes by name.
    """

    name: str
    kind: str
    provider: str
    index: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    ep_device: Any = None

    @property
    def is_cpu(self) -> bool:
        """Whether this is ONNX Runtime's own provider for the processor."""
        return self.provider == CPU_PROVIDER

    @property
    def attention_ignores(self) -> frozenset[str]:
        """What attention passes over here without a word, see ``check_attention``."""
        return KINDS[self.kind].attention_ignores if self.kind in KINDS else frozenset()

    @property
    def appends_one(self) -> bool:
        """Whether attention takes several tokens of a row at once in an empty cache only."""
        return self.kind in KINDS and KINDS[self.kind].appends_one

    @property
    def most_tokens(self) -> int | None:
        """How many tokens of a row attention is right for in one run, None for any number.

        WebGPU's shaders for Vulkan (0.4.0) do not zero what a loop declares without a value, so that attention on
        32 tokens and more adds scores to those of the keys before. NVIDIA's GPUs run a shader without such a loop.
        """
        if self.kind != "webgpu":
            return None
        # What Dawn takes unless it is told otherwise.
        backend = {"win32": "D3D12", "darwin": "Metal"}.get(sys.platform, "Vulkan")
        if self.options.get("dawnBackendType", backend) != "Vulkan":
            return None
        # The provider picks the GPU by itself, so that all have to be such.
        vendors = {device.device.vendor_id for device in plugged_devices(KINDS[self.kind])}
        return None if vendors == {_NVIDIA} else 31

    @property
    def constant_defaults(self) -> bool:
        """Whether graphs must be loaded without their optional inputs."""
        return self.kind in KINDS and KINDS[self.kind].constant_defaults

    @property
    def captures(self) -> bool:
        """Whether it can capture runs, and the caller has not forbidden it."""
        option = KINDS[self.kind].capture if self.kind in KINDS and self.ep_device is None else None
        return option is not None and self.options.get(option) != "0"

    def session_arguments(self, settings: Any, *, capture: bool = False) -> dict[str, Any]:
        """Choose the device in ``settings``, onnxruntime.SessionOptions, and return arguments for the session.

        The CPU takes the operators that the device does not. ``capture``: runs of this session can be captured.
        """
        options = dict(self.options)
        if self.ep_device is not None:
            settings.add_provider_for_devices([self.ep_device], options)
            return {}
        kind = KINDS.get(self.kind)
        if kind is not None and kind.capture is not None:
            options[kind.capture] = "1" if capture else "0"
        if kind is not None and kind.number is not None and options.get(kind.number) == "0":
            # ONNX Runtime looks for a plugin then, and warns that there is none.
            del options[kind.number]
        providers = [self.provider] if self.is_cpu else [self.provider, CPU_PROVIDER]
        return {"providers": providers, "provider_options": [options, {}][: len(providers)]}


CPU = Device("cpu", "cpu", CPU_PROVIDER)


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """The device that a caller asks for, None for the one that a folder was built for, and options for it.

    ``filters`` are what one of a plugin's devices has to be: hardware_device_type ("gpu"), hardware_device_id,
    hardware_vendor_id (numbers).
    """

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    filters: Mapping[str, str | int] = field(default_factory=dict)


def onnxruntime_version() -> str:
    """Return the version of the onnxruntime that runs the graphs."""
    return str(onnxruntime.__version__)


def available_providers() -> list[str]:
    """Return the names of the execution providers that this onnxruntime has."""
    return list(onnxruntime.get_available_providers())


def has_device(name: str) -> bool:
    """Return whether ONNX Runtime has devices of the kind ``name``, or can get them from an installed plugin."""
    try:
        find_device(parse_device(name, known=further_names()))
    except (BadOption, NoDevice):
        return False
    return True


def choose_device(
    request: DeviceRequest | str | None,
    *,
    built_for: str = "cpu",
    built_options: Mapping[str, Any] | None = None,
    folder: object = "the model",
) -> Device:
    """Return the device to run the model in ``folder`` on.

    ``built_for`` is the kind that it was built for and the default; ``built_options`` are the options that the
    folder gives to that kind, which those of the request replace one by one.
    Raises BadOption for a device or an option that does not exist, NoDevice if this machine lacks the device.
    """
    if not isinstance(request, DeviceRequest):
        request = DeviceRequest(request)
    further = further_names()
    default = request.name is None
    name = short_name(built_for) if request.name is None else request.name
    try:
        wanted = parse_device(name, known=(*further, name) if default else further, library=not default)
        if wanted.name in KINDS:
            # What is wrong everywhere is told before what this machine lacks.
            check_options(KINDS[wanted.name], request.options)
        device = find_device(replace(wanted, filters=request.filters))
    except NoDevice as error:
        if not default:
            raise
        raise NoDevice(
            f"{folder} was built for {name}, and this machine cannot run that: {error} Most folders run on the "
            'CPU too, slower: say so with --device cpu, in Python device="cpu".'
        ) from error
    kind = kind_of(device.kind, device.provider)
    inherited = without_capture(built_options or {}) if device.kind == short_name(built_for) else {}
    usual = kind.defaults.get(type_name(device.ep_device), {}) if device.ep_device is not None else {}
    options = {**usual, **check_options(kind, inherited), **check_options(kind, request.options)}
    return _with_options(device, kind, options)


def _with_options(device: Device, kind: DeviceKind, options: dict[str, str]) -> Device:
    """Return ``device`` with ``options``, of which one may be its number."""
    if kind.number is None or device.ep_device is not None:
        return replace(device, options=options)
    number = options.get(kind.number)
    if number is not None and device.name != device.kind and int(number) != device.index:
        raise BadOption(
            f"device {device.name} and option {kind.number}={number} name two devices. Leave one of them out."
        )
    index = device.index if number is None else int(number)
    if device.kind == "cuda":
        _check_cuda(Wanted("cuda", str(index)), index)
    name = device.name if number is None or index == device.index else f"{device.kind}:{index}"
    return replace(device, name=name, index=index, options={**options, kind.number: str(index)})


def find_device(wanted: Wanted) -> Device:
    """Return the device that ``wanted`` names.

    Raises NoDevice if this machine lacks it, BadOption if there can be none such.
    """
    if wanted.library is not None:
        return _pick(wanted, _kind_of_library(wanted), _devices_of(wanted.library))
    kind = kind_of(wanted.name)
    if kind.name == "cpu":
        _no_filters(wanted)
        return CPU
    # Plugins are not chosen by name: ONNX Runtime would resume with the CPU alone.
    plugged = plugged_devices(kind)
    if not plugged and kind.provider in available_providers():
        return _built_in(wanted, kind)
    if not plugged and kind.module is not None and _is_installed(kind.module):
        _register_module(kind)
        plugged = plugged_devices(kind)
        if not plugged:
            raise NoDevice(
                f"{kind.module.replace('_', '-')} is installed and finds no device here. Usual cause: a driver "
                "that is missing; on Linux WebGPU needs libvulkan.so.1 and a Vulkan driver."
            )
    if not plugged:
        raise NoDevice(_missing(kind))
    return _pick(wanted, kind, plugged)


def not_started(device: Device) -> str:
    """Return what to say of a device that ONNX Runtime did not start, without an error of its own."""
    more = ""
    if device.kind == "cuda":
        more = "".join(f" {line}" for line in _preloaded()[:3])
        more += " CUDA's libraries come with: pip install 'onnxruntime-gpu[cuda,cudnn]'."
    return (
        f"ONNX Runtime {onnxruntime_version()} could not start {device.provider} for device {device.name}; what "
        "it lacks is in its lines above. Usual cause: a library or a driver that is missing or of another version."
        + more
    )


def register_provider_library(name: str, path: str) -> None:
    """Let ONNX Runtime load the execution provider ``name`` from the library ``path``. Raises BadOption."""
    try:
        onnxruntime.register_execution_provider_library(name, path)
    except Exception as error:  # whatever its bindings raise
        raise BadOption(
            f"ONNX Runtime cannot load the execution provider {name!r} from {path}: {one_line(error)}"
        ) from error


def unregister_provider_library(name: str) -> None:
    """Undo ``register_provider_library``. Raises BadOption if ``name`` was not registered."""
    try:
        onnxruntime.unregister_execution_provider_library(name)
    except Exception as error:  # whatever its bindings raise
        raise BadOption(f"ONNX Runtime has no library for {name!r} to unload: {one_line(error)}") from error


# --- finding one -------------------------------------------------------------------------------------------


def further_names() -> list[str]:
    """Return short names of what ONNX Runtime has and ``KINDS`` has not."""
    found = [*available_providers(), *(device.ep_name for device in _ep_devices())]
    return [short_name(name) for name in dict.fromkeys(found) if name not in NO_DEVICES]


def kind_of(name: str, provider: str | None = None) -> DeviceKind:
    """Return the row of ``KINDS``, or one for a provider that only this ONNX Runtime knows."""
    if name in KINDS:
        return KINDS[name]
    listed = [*available_providers(), *(device.ep_name for device in _ep_devices())]
    full = provider or next((p for p in listed if short_name(p) == name), name)
    return DeviceKind(name, full, full, module=f"onnxruntime_ep_{name.replace('-', '_')}", open_options=True)


def _ep_devices() -> list[Any]:
    # ONNX Runtime before 1.22 has no such list.
    return list(onnxruntime.get_ep_devices()) if hasattr(onnxruntime, "get_ep_devices") else []


def plugged_devices(kind: DeviceKind) -> list[Any]:
    """Return the devices of a provider that was loaded from a library."""
    return [d for d in _ep_devices() if d.ep_name == kind.provider and "library_path" in d.ep_metadata]


def _devices_of(library: str) -> list[Any]:
    """Register the provider in the file ``library`` unless it is already, and return its devices."""
    path = Path(library).resolve()
    if not path.is_file():
        raise BadOption(
            f"{library} is not a file; --device takes the name of a device or a provider's library."
        )

    def there() -> list[Any]:
        return [d for d in _ep_devices() if Path(d.ep_metadata.get("library_path", "")).resolve() == path]

    if not there():
        register_provider_library(path.name, str(path))
    found = there()
    if not found:
        raise NoDevice(
            f"the execution provider in {library} finds no device here. Usual cause: a missing driver."
        )
    return found


def _kind_of_library(wanted: Wanted) -> DeviceKind:
    assert wanted.library is not None
    provider = _devices_of(wanted.library)[0].ep_name
    return kind_of(short_name(provider), provider)


def _pick(wanted: Wanted, kind: DeviceKind, devices: list[Any]) -> Device:
    """Return exactly one of a plugin's ``devices``."""
    matching = [device for device in devices if _matches(device, wanted.filters)]
    if not matching:
        there = "; ".join(", ".join(f"{k}={v}" for k, v in _facts(device).items()) for device in devices)
        raise NoDevice(
            f"no device {wanted} has {', '.join(f'{k}={v}' for k, v in wanted.filters.items())}; there are: "
            f"{there}."
        )
    devices = matching
    names = [f"{kind.name}:{type_name(device)}" for device in devices]
    if wanted.which is None:
        at = 0
        if len(devices) > 1 and not kind.picks_itself:
            listed = ", ".join(f"{kind.name}:{i} ({name})" for i, name in enumerate(names))
            raise BadOption(f"there are several devices {wanted}: {listed}. Name one of them.")
    elif wanted.which.isdigit():
        at = int(wanted.which)
        if at >= len(devices):
            raise NoDevice(
                f"there is no device {wanted}: this machine has {len(devices)} of that kind, from "
                f"{kind.name}:0 on."
            )
    else:
        same = [i for i, name in enumerate(names) if name == f"{kind.name}:{wanted.which.lower()}"]
        if len(same) != 1:
            raise NoDevice(
                f"there {'is no' if not same else 'are several'} {wanted}; this machine has "
                f"{', '.join(f'{kind.name}:{i} ({name})' for i, name in enumerate(names))}."
            )
        at = same[0]
    name = kind.name if wanted.which is None else f"{kind.name}:{wanted.which.lower()}"
    return Device(name, kind.name, devices[at].ep_name, at, {}, devices[at])


def _facts(device: Any) -> dict[str, str | int]:
    """Return what devices are filtered by."""
    hardware = device.device
    return {
        "hardware_device_type": type_name(device),
        "hardware_device_id": int(hardware.device_id),
        "hardware_vendor_id": int(hardware.vendor_id),
    }


def _matches(device: Any, filters: Mapping[str, str | int]) -> bool:
    facts = _facts(device)
    return all(facts[key] == value for key, value in filters.items())


def _no_filters(wanted: Wanted) -> None:
    """Raise BadOption if hardware is asked for by its ids where a provider takes none."""
    if wanted.filters:
        kind = KINDS.get(wanted.name)
        how = f", with option {kind.number}" if kind is not None and kind.number else ""
        raise BadOption(
            f"{next(iter(wanted.filters))} is for devices of plugins; device {wanted} is chosen by its name{how}. "
            "Leave it out."
        )


def type_name(device: Any) -> str:
    """Return "cpu", "gpu" or "npu" for an OrtEpDevice."""
    return str(device.device.type).rpartition(".")[2].lower()


def _built_in(wanted: Wanted, kind: DeviceKind) -> Device:
    """Return a device of a provider that is part of this ONNX Runtime, which goes by name."""
    _no_filters(wanted)
    which = wanted.which or "0"
    if not which.isdigit() or (kind.number is None and wanted.which not in (None, "0")):
        numbered = f", as {kind.name}:0" if kind.number else ""
        raise BadOption(f"device {wanted} cannot be chosen. Say {kind.name}{numbered}.")
    if kind.name == "cuda":
        _check_cuda(wanted, int(which))
    return Device(str(wanted), kind.name, kind.provider, int(which))


def _missing(kind: DeviceKind) -> str:
    """Return what this machine lacks for a kind of device, and the one command that helps."""
    if kind.systems and not sys.platform.startswith(kind.systems):
        return f"{kind.title} exists on {' and '.join(kind.systems)} only."
    both = installed_packages()
    package = (kind.install or "").partition("[")[0]
    if package in both and len(both) > 1:
        return (
            f"{' and '.join(both)} are both installed, and hold the same files: what was installed first is gone. "
            f"Bring it back with: pip install --force-reinstall --no-deps {package}"
        )
    has = ", ".join(short_name(name) for name in available_providers() if name not in NO_DEVICES)
    install = to_install(kind)
    how = f" Install it with: pip install '{install}'" if install is not None else ""
    return f"onnxruntime {onnxruntime_version()} has no {kind.name}; it has {has}.{how}"


def to_install(kind: DeviceKind) -> str | None:
    """Return what pip installs to bring a kind of device, None if that is there or would not help."""
    if kind.install is None or (kind.systems and not sys.platform.startswith(kind.systems)):
        return None
    there = kind.provider in available_providers() or kind.install.partition("[")[0] in installed_packages()
    return None if there or (kind.module is not None and _is_installed(kind.module)) else kind.install


@functools.cache
def installed_packages() -> tuple[str, ...]:
    """Return which of the packages that hold an onnxruntime are installed; more than one is a mistake."""
    # Asked in messages only, and not quick to import.
    import importlib.metadata

    def there(name: str) -> bool:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    return tuple(name for name in _PACKAGES if there(name))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _register_module(kind: DeviceKind) -> None:
    """Register the plugin in a kind's Python package. Raises NoDevice if it cannot be loaded."""
    assert kind.module is not None
    try:
        path = importlib.import_module(kind.module).get_library_path()
        register_provider_library(kind.name, str(path))
    except Exception as error:  # a stranger's package
        raise NoDevice(
            f"{kind.module.replace('_', '-')} is installed and does not load: {one_line(error)}"
        ) from error


# --- CUDA --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CudaGpu:
    """A GPU as NVIDIA's driver numbers it for this process: CUDA_VISIBLE_DEVICES counts."""

    name: str
    memory_bytes: int


@functools.cache
def cuda_gpus() -> tuple[CudaGpu, ...] | None:
    """Return the GPUs that NVIDIA's driver shows to this process; None if there is no driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return ()
        found = []
        for number in range(count.value):
            handle, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
            driver.cuDeviceGet(ctypes.byref(handle), number)
            driver.cuDeviceGetName(name, len(name), handle)
            driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
            found.append(CudaGpu(name.value.decode("utf-8", "replace"), size.value))
        return tuple(found)
    except (OSError, AttributeError):
        return None


def _check_cuda(wanted: Wanted, number: int) -> None:
    """Raise NoDevice if there is no such GPU; make CUDA's libraries known otherwise."""
    gpus = cuda_gpus()
    if not gpus:
        raise NoDevice(
            "no NVIDIA GPU is seen here: "
            + ("its driver is not installed." if gpus is None else "the driver shows none to this process.")
        )
    if number >= len(gpus):
        raise NoDevice(
            f"there is no device {wanted}: the driver shows {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}, from "
            "cuda:0 on (CUDA_VISIBLE_DEVICES counts)."
        )
    _preloaded()


@functools.cache
def _preloaded() -> tuple[str, ...]:
    """Load CUDA's and cuDNN's libraries from their Python packages, once; return what could not be loaded.

    ONNX Runtime finds them in the system's paths only, where they are not after ``pip install``.
    """
    if not hasattr(onnxruntime, "preload_dlls"):
        return ()
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        try:
            onnxruntime.preload_dlls()
        except Exception as error:  # it reads other packages' files
            return (one_line(error),)
    return tuple(line.strip() for line in heard.getvalue().splitlines() if "ailed" in line)
