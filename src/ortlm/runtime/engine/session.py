"""ONNX Runtime behind a small surface. The only file that imports onnxruntime.

``Backend`` and ``Binding`` are what the rest of the runtime relies on; tests put numpy behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Union

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ortlm._utils.checked_json import shown
from ortlm._utils.cpu import physical_cores
from ortlm._utils.formatting import one_line
from ortlm._utils.limits import MOST_THREADS
from ortlm.artifact.external_data import check_external_data
from ortlm.dtypes import BY_ORT, Array, DType, dtype
from ortlm.errors import BadArtifact, BadOption, Cancelled, nearest
from ortlm.runtime.engine.huge_pages import huge_pages, keep_freed_memory

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_LARGE_BYTES = 64 << 20

# An execution provider's name, alone or with its options.
Provider = Union[str, tuple[str, Mapping[str, str]]]  # noqa: UP007 - evaluated at run time

# All of ONNX Runtime's own, whichever version has which, and what its bindings raise: RuntimeError at runs,
# ValueError and UnicodeDecodeError for what damaged graphs are called, IndexError and TypeError for odd shapes.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(ort_errors).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
    OverflowError,
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, element type and shape of a graph's input or output; a dimension that varies is None."""

    name: str
    dtype: DType
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """A tensor that graphs read or write.

    ``value`` is ONNX Runtime's handle. ``array`` is the memory that it aliases, None if it lies on a device
    or belongs to ONNX Runtime. ``owner`` is what else has to live as long.
    """

    value: Any
    array: Array | None = None
    owner: Any = None

    def numpy(self) -> Array:
        """Return the contents: the aliased memory itself if there is some, else a copy."""
        if self.array is not None:
            return self.array
        found: Array = self.value.numpy()
        return found


class Binding(Protocol):
    """Which tensors a run reads and writes. What was bound stays bound until it is bound anew."""

    def input(self, name: str, tensor: DeviceTensor) -> None:
        """Let runs read ``tensor`` as the input ``name``."""

    def input_array(self, name: str, array: Array, address: int | None = None) -> None:
        """Let runs read ``array``, in main memory, as the input ``name``: faster than to make a tensor of it.

        ``address`` is where it lies, if that is known.
        """

    def output(self, name: str, tensor: DeviceTensor | None) -> None:
        """Let the next run write the output ``name`` to ``tensor``, or to new memory if that is None."""

    def result(self, name: str) -> DeviceTensor:
        """Return what the last run wrote to the output ``name``."""

    def stop(self) -> None:
        """End the run that another thread is in with this binding, or else the next one, with Cancelled."""

    def go_on(self) -> None:
        """Take ``stop`` back."""


class Backend(Protocol):
    """Something that runs one graph: ``Session``, or a fake in tests."""

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        """Every input that must be given."""

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Every output."""

    def tensor(self, array: Array) -> DeviceTensor:
        """Return a tensor that aliases ``array``, in main memory."""

    def place(self, array: Array) -> DeviceTensor:
        """Return ``array`` as a tensor where the graph computes; it aliases ``array`` on a CPU."""

    def binding(self) -> Binding:
        """Return an empty binding."""

    def run(self, binding: Binding, *, brief: bool = False) -> None:
        """Run the graph once; see Session."""


class Session:
    """One ONNX graph loaded by ONNX Runtime.

    ``threads`` is the number of threads for one operator, by default the physical cores this process may
    use. ``providers`` are execution providers by name, with or without "ExecutionProvider", each alone or with its
    options, by default the CPU. ``options`` are attributes of onnxruntime.SessionOptions or configuration entries.
    ``model`` is the graph if that is another than ``path`` holds, with the same weights. ``weights_of`` is the
    graph beside it after which the files of its weights are named, by default itself.
    Raises BadArtifact if the graph cannot be loaded, BadOption for an unknown provider or a bad number.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        options: Mapping[str, Any] | None = None,
        model: bytes | None = None,
        weights_of: Path | None = None,
    ) -> None:
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise BadOption(f"threads must be at least 1, and at most {MOST_THREADS}, found {threads}.")
        self.path = path
        chosen = _providers(providers)
        self.providers = list(chosen)
        settings = _session_options(options or {}, threads)
        if model is not None:
            settings.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent.resolve()))
        check_external_data(path if model is None else model, path.parent)
        # Small models live in the processor's caches and gain nothing from huge pages.
        named = path if weights_of is None else weights_of
        weights = sum(file.stat().st_size for file in named.parent.glob(f"{named.name}*"))
        large = weights >= _LARGE_BYTES and self.providers[0].startswith("CPU")
        try:
            with huge_pages(threads=settings.intra_op_num_threads or 1) if large else nullcontext():
                self._session = onnxruntime.InferenceSession(
                    str(path) if model is None else model,
                    settings,
                    providers=self.providers,
                    provider_options=list(chosen.values()),
                )
                self._inputs = _infos(self._session.get_inputs(), path)
                self._outputs = _infos(self._session.get_outputs(), path)
                self.optional = _infos(self._session.get_overridable_initializers(), path)
        except _ORT_ERRORS as error:
            raise BadArtifact(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {one_line(error)} "
                "If the folder was copied, check that it is complete; else build the model again."
            ) from error
        absent = [name for name in self.providers if name not in self._session.get_providers()]
        if absent:
            # ONNX Runtime says so on stderr and goes on without it.
            raise BadOption(
                f"ONNX Runtime {onnxruntime.__version__} could not start {', '.join(absent)}; what it lacks is in "
                "its lines above. Usual cause: a library or a driver that is missing or of another version."
            )
        self.threads = settings.intra_op_num_threads
        self.device = "cuda" if self._session.get_providers()[0].startswith("CUDA") else "cpu"
        keep_freed_memory()

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        """Every input that must be given."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Every output."""
        return self._outputs

    def tensor(self, array: Array) -> DeviceTensor:
        """Return a tensor that aliases ``array``, in main memory. ``array`` must be contiguous."""
        if array.dtype == dtype("bf16").numpy:
            # ONNX Runtime takes the bits only: numpy itself has no such type.
            bits, kind = array.view(np.uint16), dtype("bf16").onnx
            return DeviceTensor(onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind), array)
        return DeviceTensor(onnxruntime.OrtValue.ortvalue_from_numpy(array), array)

    def place(self, array: Array) -> DeviceTensor:
        """Return ``array`` as a tensor where the graph computes; it aliases ``array`` on a CPU."""
        if self.device == "cpu":
            return self.tensor(array)
        return DeviceTensor(onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0))

    def binding(self) -> OrtBinding:
        """Return an empty binding for ``run``."""
        return OrtBinding(self._session.io_binding(), self.device)

    def run(self, binding: Binding, *, brief: bool = False) -> None:
        """Run the graph on what ``binding`` names.

        Raises BadArtifact if ONNX Runtime refuses, Cancelled after ``binding.stop()``; a run that is ``brief``
        is stopped before it begins only, which saves the time to ask.
        """
        assert isinstance(binding, OrtBinding)
        try:
            if binding.stopped:
                binding.go_on()
                raise Cancelled("the generation was cancelled.")
            self._session.run_with_iobinding(binding.io, None if brief else binding.options)
        except _ORT_ERRORS as error:
            if binding.stopped:
                binding.go_on()
                raise Cancelled("the generation was cancelled.") from error
            raise BadArtifact(f"ONNX Runtime could not run {self.path}: {one_line(error)}") from error


def read_adapter(path: Path) -> dict[str, tuple[TensorInfo, DeviceTensor]]:
    """Return the tensors of the ``.onnx_adapter`` file ``path`` by the name of the input that each is for.

    Raises BadArtifact if there is no such file, or if it is damaged.
    """
    if not path.is_file():
        raise BadArtifact(f"{path} is not a file. An adapter is a file that `ortlm build --adapter` writes.")
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
        infos = _infos([_Node(name, v.data_type(), v.shape()) for name, v in values.items()], path)
    except _ORT_ERRORS as error:
        raise BadArtifact(
            f"{path} cannot be read as an adapter of ONNX Runtime: {one_line(error)}. Usual cause: a copy that "
            "stopped early, or an adapter of peft, which `ortlm build --adapter NAME=FOLDER` takes."
        ) from error
    return {name: (infos[name], DeviceTensor(value, owner=file)) for name, value in values.items()}


class _Node(NamedTuple):
    """A tensor as ONNX Runtime describes inputs and outputs."""

    name: str
    type: str
    shape: Sequence[Any]


class OrtBinding:
    """A Binding over onnxruntime's IOBinding. It keeps alive whatever memory is bound."""

    def __init__(self, io: Any, device: str) -> None:
        self.io = io
        self.options = onnxruntime.RunOptions()
        self.stopped = False
        self._device = device
        self._kept: dict[str, DeviceTensor] = {}
        self._places: dict[str, int] = {}
        self._arrays: dict[str, Array] = {}

    def input(self, name: str, tensor: DeviceTensor) -> None:
        """Let runs read ``tensor`` as the input ``name``."""
        self.io.bind_ortvalue_input(name, tensor.value)
        self._kept[name] = tensor

    def input_array(self, name: str, array: Array, address: int | None = None) -> None:
        """Let runs read ``array``, in main memory, as the input ``name``: faster than to make a tensor of it.

        ``address`` is where it lies, if that is known.
        """
        address = array.ctypes.data if address is None else address
        self.io.bind_input(name, "cpu", 0, array.dtype, array.shape, address)
        self._arrays[name] = array

    def output(self, name: str, tensor: DeviceTensor | None) -> None:
        """Let the next run write the output ``name`` to ``tensor``, or to new memory if that is None."""
        self._places.setdefault(name, len(self._places))
        if tensor is None:
            self.io.bind_output(name, self._device)
            self._kept.pop(name, None)
        else:
            self.io.bind_ortvalue_output(name, tensor.value)
            self._kept[name] = tensor

    def result(self, name: str) -> DeviceTensor:
        """Return what the last run wrote to the output ``name``."""
        if name in self._kept:
            return self._kept[name]
        # get_outputs() lists outputs in the order in which they were first bound.
        return DeviceTensor(self.io.get_outputs()[self._places[name]])

    def stop(self) -> None:
        """End the run that another thread is in with this binding, or else the next one, with Cancelled."""
        self.stopped = self.options.terminate = True

    def go_on(self) -> None:
        """Take ``stop`` back."""
        self.stopped = self.options.terminate = False


def _infos(nodes: Sequence[Any], path: Path) -> dict[str, TensorInfo]:
    found = {}
    for node in nodes:
        if node.type not in BY_ORT:
            raise BadArtifact(
                f"{path}: tensor {shown(node.name)} has the element type {shown(node.type)}, not known."
            )
        shape = tuple(d if isinstance(d, int) else None for d in node.shape)
        found[node.name] = TensorInfo(node.name, BY_ORT[node.type], shape)
    return found


def onnxruntime_version() -> str:
    """Return the version of the onnxruntime that runs the graphs."""
    return str(onnxruntime.__version__)


def available_providers() -> list[str]:
    """Return the names of the execution providers that this onnxruntime has."""
    return list(onnxruntime.get_available_providers())


def register_provider_library(name: str, path: str) -> None:
    """Let ONNX Runtime load the execution provider ``name`` from the library ``path``. Raises BadOption."""
    try:
        onnxruntime.register_execution_provider_library(name, path)
    except _ORT_ERRORS as error:
        raise BadOption(
            f"ONNX Runtime cannot load the execution provider {name!r} from {path}: {error}"
        ) from error


def unregister_provider_library(name: str) -> None:
    """Undo ``register_provider_library``. Raises BadOption if ``name`` was not registered."""
    try:
        onnxruntime.unregister_execution_provider_library(name)
    except _ORT_ERRORS as error:
        raise BadOption(f"ONNX Runtime has no library for {name!r} to unload: {error}") from error


def provider_names(wanted: Sequence[Provider] | None) -> list[str]:
    """Return the names of the execution providers ``wanted``, as they are spelled there; by default the CPU's."""
    return [provider if isinstance(provider, str) else provider[0] for provider in wanted or ("cpu",)]


def _providers(wanted: Sequence[Provider] | None) -> dict[str, dict[str, str]]:
    """Return ``wanted`` under ONNX Runtime's names, with options; the CPU takes what no other provider does."""
    available = onnxruntime.get_available_providers()
    short = {name.lower().removesuffix("executionprovider"): name for name in available}
    chosen: dict[str, dict[str, str]] = {}
    for provider in wanted or ():
        name, options = (provider, {}) if isinstance(provider, str) else provider
        key = name.lower().removesuffix("executionprovider")
        if key not in short:
            raise BadOption(
                f"execution provider {name!r} is not in this onnxruntime {onnxruntime.__version__}; "
                f"it has {', '.join(short)}." + nearest(key, short)
            )
        if key == "cpu" and options:
            raise BadOption(
                f"the execution provider for the CPU has no options, found {', '.join(options)}. Leave them out."
            )
        chosen[short[key]] = dict(options)
    chosen.setdefault(short["cpu"], {})
    return chosen


_ATTRIBUTES = (
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "enable_mem_reuse",
    "enable_profiling",
    "inter_op_num_threads",
    "intra_op_num_threads",
    "log_severity_level",
    "log_verbosity_level",
    "use_deterministic_compute",
)


def _set_option(options: Any, key: str, value: Any) -> None:
    if key in _ATTRIBUTES:
        setattr(options, key, value)
    elif key == "graph_optimization_level":
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, str(value), value)
    elif isinstance(value, (str, int, float)):
        text = str(int(value)) if isinstance(value, bool) else str(value)
        options.add_session_config_entry(key, text)
    else:
        raise TypeError("it must be a string or a number")


def _session_options(found: Mapping[str, Any], threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    # A pattern is kept for every new shape, so memory would grow with each token.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    for key, value in found.items():
        try:
            _set_option(options, key, value)
        except _ORT_ERRORS as error:
            raise BadOption(
                f"session option {shown(key)} cannot be {shown(value)}: {one_line(error)}."
            ) from error
    if options.intra_op_num_threads > MOST_THREADS or options.inter_op_num_threads > MOST_THREADS:
        raise BadOption(f"session options may ask for {MOST_THREADS} threads at most.")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
