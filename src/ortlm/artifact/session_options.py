"""Which options of ONNX Runtime an artifact may set, with which values.

ONNX Runtime takes paths, libraries, file names and numbers of threads by such options. An artifact is a stranger's
folder, so it sets only what changes how its own graph is computed: what ortlm and onnxruntime-genai's builder
write. Programs set whatever they want, by their own overlay of the configuration.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from ortlm._utils.checked_json import Field, check, check_value, flag, integer, one_of, place, shown
from ortlm._utils.cpu import INTEGERS_DO_NOT_OVERFLOW
from ortlm.errors import BadArtifact, nearest

_log = logging.getLogger(__name__)

_SWITCH = one_of("0", "1", 0, 1, True, False)
_NAMES = re.compile(r"[A-Za-z0-9_;]{0,1000}")
_DEVICE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,60}")
_LEVELS = (
    "ORT_DISABLE_ALL",
    "ORT_ENABLE_BASIC",
    "ORT_ENABLE_EXTENDED",
    "ORT_ENABLE_LAYOUT",
    "ORT_ENABLE_ALL",
)

_ALLOWED: Mapping[str, Field] = {
    "enable_cpu_mem_arena": flag(),
    "enable_mem_pattern": flag(),
    "enable_mem_reuse": flag(),
    "use_deterministic_compute": flag(),
    "graph_optimization_level": one_of(*_LEVELS),
    "ep.cuda.fpa_intb_gemm": _SWITCH,
    "optimization.disable_specified_optimizers": Field(
        lambda v: isinstance(v, str) and _NAMES.fullmatch(v) is not None,
        "names of optimizers, separated by ;",
    ),
    "session.use_device_allocator_for_initializers": _SWITCH,
    INTEGERS_DO_NOT_OVERFLOW: _SWITCH,
}

# What configurations for onnxruntime-genai carry too, and what is known of the machine here decides instead. They
# change no result, so they are passed over; the ranges keep out what nobody means.
_PASSED_OVER: Mapping[str, Field] = {
    "log_id": Field(lambda v: isinstance(v, str) and len(v) <= 200, "a short string"),
    "log_severity_level": integer(0, 4),
    "log_verbosity_level": integer(0, 10_000),
    "intra_op_num_threads": integer(0, 1_024),
    "inter_op_num_threads": integer(0, 1_024),
    # The official runtime writes a file of this name.
    "enable_profiling": one_of(False, ""),
}

# By provider, as people write it in lower case. Others than these take no options from an artifact.
_PROVIDERS: Mapping[str, Mapping[str, Field]] = {
    "cuda": {"enable_cuda_graph": _SWITCH, "enable_skip_layer_norm_strict_mode": _SWITCH},
    "dml": {"enable_graph_capture": _SWITCH},
    "webgpu": {
        "enableGraphCapture": _SWITCH,
        "validationMode": one_of("disabled", "wgpuOnly", "basic", "full"),
        # Where the second table of rotations begins, in graphs that have both in one.
        "multiRotaryCacheConcatOffset": Field(
            lambda v: re.fullmatch(r"[0-9]{1,8}", str(v)) is not None, "a whole number"
        ),
    },
    "nvtensorrtrtx": {"enable_cuda_graph": _SWITCH},
}


def session_options(found: Mapping[str, Any], file: object, at: str = "session_options") -> dict[str, Any]:
    """Return the options that ``ortlm.json`` sets. Raises BadArtifact, by name, for any that is not allowed."""
    return {
        key: check_value(value, _field(key, file, at), file=file, error=BadArtifact, at=place(at, key))
        for key, value in found.items()
        if value is not None
    }


def genai_session_options(found: Any, file: object, at: str) -> dict[str, Any]:
    """Return ``found``, the session options of a part of ``genai_config.json``, without what is passed over.

    ``provider_options`` stay, checked too. Raises BadArtifact, by name, for any that is not allowed.
    """
    if not isinstance(found, dict):
        raise BadArtifact(f"{file}: {at} is {shown(found)}, expected an object.")
    kept = dict(found)
    if kept.pop("custom_ops_library", None):
        raise BadArtifact(
            f"{file}: {at} asks for a library of custom operators (custom_ops_library), which is not supported."
        )
    for key, field in _PASSED_OVER.items():
        if kept.get(key) is not None:
            value = check_value(kept[key], field, file=file, error=BadArtifact, at=place(at, key))
            if key != "log_id":
                _log.info("%s: %s is %s, which is decided here instead", file, place(at, key), shown(value))
        kept.pop(key, None)
    providers = kept.pop("provider_options", None)
    kept = session_options(kept, file, at)
    if providers is not None:
        kept["provider_options"] = _provider_options(providers, file, place(at, "provider_options"))
    return kept


def _provider_options(found: Any, file: object, at: str) -> list[dict[str, dict[str, Any]]]:
    wrong = BadArtifact(f"{file}: {at} is {shown(found)}, expected a list of objects, one for each provider.")
    if not isinstance(found, list):
        raise wrong
    out = []
    for entry in found:
        if not isinstance(entry, dict) or not all(isinstance(value or {}, dict) for value in entry.values()):
            raise wrong
        checked = {}
        for name, given in entry.items():
            check_device(name, file, at)
            fields = _PROVIDERS.get(name.lower().removesuffix("executionprovider"), {})
            values = {key: value for key, value in (given or {}).items() if value is not None}
            for key in values:
                if key not in fields:
                    raise BadArtifact(
                        f"{file}: {place(place(at, name), key)} is not allowed in an artifact. Allowed: "
                        f"{', '.join(fields) or 'no option of this provider'}."
                    )
            wanted = {key: fields[key] for key in values}
            checked[name] = check(values, wanted, file=file, error=BadArtifact, at=place(at, name))
        out.append(checked)
    return out


def check_device(name: str, file: object, at: str) -> str:
    """Return ``name``, the kind of device or provider that a folder names. Raises BadArtifact for a path, say."""
    if not _DEVICE.fullmatch(name):
        raise BadArtifact(f"{file}: {at} is {shown(name)}, expected a kind of device such as cuda.")
    return name


def device_options(found: Mapping[str, Any], device: str, file: object, at: str) -> dict[str, str]:
    """Return the options that an artifact gives to the execution provider of its ``device``, as texts."""
    checked = _provider_options([{device: dict(found)}], file, at)[0][device]
    return {key: str(int(value)) if isinstance(value, bool) else str(value) for key, value in checked.items()}


def _field(key: str, file: object, at: str) -> Field:
    if key not in _ALLOWED:
        raise BadArtifact(
            f"{file}: {place(at, key)} is not allowed in an artifact, which sets no paths, files, libraries or "
            f"threads. Allowed: {', '.join(_ALLOWED)}." + nearest(key, _ALLOWED)
        )
    return _ALLOWED[key]
