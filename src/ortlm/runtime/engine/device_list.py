"""What this machine can run on, for people."""

from __future__ import annotations

import pkgutil
import sys
from dataclasses import dataclass
from typing import Any

from ortlm._utils.cpu import cpu_name, instruction_sets, memory_bytes
from ortlm.errors import BadOption, NoDevice
from ortlm.runtime.engine.device_kinds import KINDS, DeviceKind, Wanted
from ortlm.runtime.engine.devices import (
    cuda_gpus,
    find_device,
    further_names,
    kind_of,
    onnxruntime_version,
    plugged_devices,
    to_install,
    type_name,
)


@dataclass(frozen=True, slots=True)
class Listed:
    """A device for people: ``name`` as --device takes it, ``what`` it is, and the provider that runs it.

    ``version`` and ``memory_bytes`` are None where they cannot be known. ``ready`` says whether it can be used
    now; otherwise ``missing`` says why, and ``install`` is what pip installs if that is all. ``instructions`` are
    a processor's for int8.
    """

    name: str
    what: str
    provider: str
    version: str | None
    memory_bytes: int | None
    ready: bool
    missing: str | None = None
    install: str | None = None
    instructions: tuple[str, ...] = ()


def list_devices() -> list[Listed]:
    """Return the devices of this machine, and the known kinds that it lacks. Installed plugins are loaded."""
    memory = memory_bytes()
    found = [
        Listed(
            "cpu",
            cpu_name(),
            "CPU",
            onnxruntime_version(),
            memory,
            True,
            instructions=tuple(instruction_sets()),
        )
    ]
    names = [*KINDS, *further_names(), *_installed_plugins()]
    for name in dict.fromkeys(names):
        kind = kind_of(name)
        if name != "cpu" and (not kind.systems or sys.platform.startswith(kind.systems)):
            found += _listed(kind)
    return found


def _listed(kind: DeviceKind) -> list[Listed]:
    provider = kind.provider.removesuffix("ExecutionProvider")

    def lacking(why: str) -> list[Listed]:
        gpus = cuda_gpus() if kind.name == "cuda" else None
        what = ", ".join(gpu.name for gpu in gpus) if gpus else kind.title
        memory = gpus[0].memory_bytes if gpus else None
        return [Listed(kind.name, what, provider, None, memory, False, why, to_install(kind))]

    try:
        find_device(Wanted(kind.name))
    except NoDevice as error:
        return lacking(str(error))
    except BadOption:
        pass  # there are several
    if plugged := plugged_devices(kind):
        several = len(plugged) > 1 and not kind.picks_itself
        return [
            Listed(
                f"{kind.name}:{at}" if several else kind.name,
                _hardware(device, kind),
                provider,
                device.ep_metadata.get("version"),
                memory_bytes() if type_name(device) == "cpu" else None,
                True,
            )
            for at, device in enumerate(plugged[:1] if kind.picks_itself else plugged)
        ]
    gpus = (cuda_gpus() or ()) if kind.name == "cuda" else ()
    if not gpus:
        return [Listed(kind.name, kind.title, provider, onnxruntime_version(), None, True)]
    return [
        Listed(
            f"cuda:{at}" if len(gpus) > 1 else "cuda",
            gpu.name,
            provider,
            onnxruntime_version(),
            gpu.memory_bytes,
            True,
        )
        for at, gpu in enumerate(gpus)
    ]


def _hardware(device: Any, kind: DeviceKind) -> str:
    """Return what is known of a plugin's device."""
    facts, hardware = device.ep_metadata, device.device
    name = facts.get("FULL_DEVICE_NAME") or hardware.metadata.get("Description")
    if not name:
        name = cpu_name() if type_name(device) == "cpu" else f"{hardware.vendor} {kind.title}".strip()
    return f"{name} ({type_name(device).upper()})"


def _installed_plugins() -> list[str]:
    """Return the short names of all plugin packages that are installed."""
    prefix = "onnxruntime_ep_"
    modules = {kind.module for kind in KINDS.values()}
    return [
        module.name.removeprefix(prefix)
        for module in pkgutil.iter_modules()
        if module.name.startswith(prefix) and module.name not in modules
    ]
