"""ONNX Runtime through the protocols of ``backend``. Only this file and ``devices`` import onnxruntime."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ortlm._utils.checked_json import shown
from ortlm._utils.cpu import physical_cores
from ortlm._utils.formatting import one_line
from ortlm._utils.limits import MOST_THREADS
from ortlm.artifact.external_data import check_external_data
from ortlm.dtypes import BY_ORT, Array, DType, dtype
from ortlm.errors import BadArtifact, BadOption, Cancelled, Error, NoDevice
from ortlm.runtime.engine.backend import Binding, DeviceTensor, Memory, TensorInfo
from ortlm.runtime.engine.constant_folding import folded
from ortlm.runtime.engine.device_memory import DeviceMemory
from ortlm.runtime.engine.devices import CPU, Device, not_started
from ortlm.runtime.engine.host_memory import HostMemory
from ortlm.runtime.engine.huge_pages import (
    give_back_freed_memory,
    keep_freed_memory,
    use_huge_pages_soon,
)

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_LARGE_BYTES = 64 << 20
# Weights are brought into the kernels' layout on all threads; ONNX Runtimes before 1.32 do not know the option.
_DEFAULTS = {"session.prepack.enable_parallel": "1"}
# The highest of ONNX Runtime's log levels.
_FATAL = 4
# Which captured run a run is, for every provider.
_CAPTURE, _NOT_CAPTURED = "gpu_graph_id", "-1"

_BF16 = dtype("bf16")
# ONNX Runtime's name of a kind of device, and its number.
Place = tuple[str, int]
# The same by the beginning of what its memory is called.
_DEVICES = {"cuda": "cuda", "dml": "dml", "webgpu": "gpu"}

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


class Session:
    """One ONNX graph loaded by ONNX Runtime.

    ``threads`` is the number of threads for one operator, by default the physical cores this process may
    use. ``device`` computes, by default the CPU. ``options`` are attributes of onnxruntime.SessionOptions or
    configuration entries. ``model`` is the graph if that is another than ``path`` holds, with the same weights.
    ``weights_of`` is the graph next to it after which the files of its weights are named, by default itself.
    ``capture``: runs are captured where the device can do that and the graph lets it.
    ``meanwhile`` begins something in another thread, when what is left of loading leaves Python to others.
    Raises BadArtifact if the graph cannot be loaded, NoDevice if the device does not start, BadOption for a bad
    number.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        device: Device = CPU,
        options: Mapping[str, Any] | None = None,
        model: bytes | None = None,
        weights_of: Path | None = None,
        capture: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise BadOption(f"threads must be at least 1, and at most {MOST_THREADS}, found {threads}.")
        self.path = path
        settings = _session_options(options or {}, threads)
        check_external_data(path if model is None else model, path.parent)
        # What ONNX Runtime reads where it is, as long as there is a session.
        self._given: list[Any] = []
        constants = None
        if model is None and device.is_cpu:
            constants = folded(path, threads=settings.intra_op_num_threads, run=run_once)
        if constants is not None:
            model = constants.graph
            self._given = [_alias(array).value for array in constants.given.values()]
            for name, value in zip(constants.given, self._given, strict=True):
                settings.add_initializer(name, value)
        if model is not None:
            settings.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent.resolve()))
        named = path if weights_of is None else weights_of
        weights = sum(file.stat().st_size for file in named.parent.glob(f"{named.name}*"))
        self._captures = capture and device.captures
        self._device = device
        if meanwhile is not None:
            meanwhile()
        try:
            self._session = self._load(device, settings, str(path) if model is None else model)
            # Kept for another attempt with other providers, which is never made.
            self._session._model_bytes = None
            self._inputs = _infos(self._session.get_inputs(), path)
            self._outputs = _infos(self._session.get_outputs(), path)
            self.optional = _infos(self._session.get_overridable_initializers(), path)
        except _ORT_ERRORS as error:
            raise BadArtifact(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {one_line(error)} "
                "If the folder was copied, check that it is complete; else build the model again."
            ) from error
        if device.provider not in self._session.get_providers():
            # ONNX Runtime says so on stderr and continues without it.
            raise NoDevice(not_started(device))
        self.threads = settings.intra_op_num_threads
        self._place = _place(self._session)
        # What a plugin is given is a copy, also where it computes on the processor.
        self.memory: Memory = HostMemory(self.tensor, is_host=device.is_cpu)
        if self._place is not None:
            self.memory = DeviceMemory(_Runner(self._place, device))
        # What another thread asks of the device while a run is captured would be captured with it.
        self._one_by_one = threading.Lock()
        self._numbered: dict[int, Any] = {}
        self._dropped: list[int] = []
        if constants is not None:
            constants.scratch.rest()
        keep_freed_memory()
        # Small models live in the processor's caches and gain nothing from huge pages.
        if weights >= _LARGE_BYTES:
            give_back_freed_memory()
            if device.is_cpu:
                use_huge_pages_soon()

    def _load(self, device: Device, settings: Any, model: str | bytes) -> Any:
        def load() -> Any:
            return onnxruntime.InferenceSession(
                model, settings, **device.session_arguments(settings, capture=self._captures)
            )

        if not self._captures:
            return load()
        usual = settings.log_severity_level
        # Errors are raised, so that there is nothing to say on stderr.
        settings.log_severity_level = _FATAL
        try:
            return load()
        except _ORT_ERRORS as error:
            # Control flow, or operators that run on the CPU.
            if "graph capture" not in str(error):
                raise
        self._captures, settings.log_severity_level = False, usual
        return load()

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        """Every input that must be given."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Every output."""
        return self._outputs

    @property
    def captures(self) -> bool:
        """Whether runs can be captured."""
        return self._captures

    def tensor(self, array: Array) -> DeviceTensor:
        """Return a tensor that aliases ``array``, in main memory. ``array`` must be contiguous."""
        return _alias(array)

    def binding(self) -> OrtBinding:
        """Return an empty binding for ``run``."""
        binding = OrtBinding(self._session.io_binding(), self._place)
        # Where it is not said, ONNX Runtime's Python raises an error for itself at every run, for 0.1 ms.
        binding.options.add_run_config_entry(_CAPTURE, _NOT_CAPTURED)
        return binding

    def run(self, binding: Binding, *, brief: bool = False, capture: int | None = None) -> None:
        """Run the graph on what ``binding`` names.

        With ``capture``, a number, the run is captured, or launched again if that has been done. It then reads
        and writes where the first one did, so what is bound must not change. Raises BadArtifact if ONNX Runtime
        refuses, Cancelled after ``binding.stop()``; a run that is ``brief`` is stopped before it begins only,
        which saves the time to ask.
        """
        assert isinstance(binding, OrtBinding)
        try:
            if binding.stopped:
                binding.resume()
                raise Cancelled("the generation was cancelled.")
            if not self._captures:
                self._session.run_with_iobinding(binding.io, None if brief else binding.options)
                return
            with self._one_by_one:
                self._release_dropped()
                options = binding.options if capture is None else self._options_of(capture)
                self._session.run_with_iobinding(binding.io, options)
        except _ORT_ERRORS as error:
            if binding.stopped:
                binding.resume()
                raise Cancelled("the generation was cancelled.") from error
            raise _not_run(error, f"run {self.path}", self._device) from error

    def release(self, capture: int) -> None:
        """Forget the run that was captured under the number ``capture``, before the next one at the latest."""
        # Whoever drops states may be garbage collection in the middle of a run, which holds the lock.
        self._dropped.append(capture)

    def _release_dropped(self) -> None:
        while self._dropped:
            capture = self._dropped.pop()
            # Older ONNX Runtimes cannot, and keep it as long as the session.
            if self._numbered.pop(capture, None) and hasattr(self._session, "release_captured_graph"):
                self._session.release_captured_graph(capture)

    def _options_of(self, capture: int) -> Any:
        options = self._numbered.get(capture)
        if options is None:
            options = self._numbered[capture] = onnxruntime.RunOptions()
            options.add_run_config_entry(_CAPTURE, str(capture))
        return options


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
    """A Binding over onnxruntime's IOBinding. It keeps alive whatever memory is bound.

    ``place`` is where new memory for outputs comes from, None for main memory.
    """

    def __init__(self, io: Any, place: Place | None) -> None:
        self.io = io
        self.options = onnxruntime.RunOptions()
        self.stopped = False
        self._place = place
        self._kept: dict[str, DeviceTensor] = {}
        self._places: dict[str, int] = {}
        self._arrays: dict[str, Array] = {}
        self._on_device: set[str] = set()

    def input(self, name: str, tensor: DeviceTensor) -> None:
        """Let runs read ``tensor`` as the input ``name``."""
        self.io.bind_ortvalue_input(name, tensor.value)
        self._kept[name] = tensor

    def input_array(self, name: str, array: Array, address: int | None = None) -> None:
        """Let runs read ``array``, in main memory, as the input ``name``: faster than to make a tensor of it.

        ``address`` is where it lies, if that is known.
        """
        address = array.ctypes.data if address is None else address
        kind = _BF16.onnx if array.dtype == _BF16.numpy else array.dtype
        self.io.bind_input(name, "cpu", 0, kind, array.shape, address)
        self._arrays[name] = array

    def output(self, name: str, tensor: DeviceTensor | None, *, to_host: bool = False) -> None:
        """Let the next run write the output ``name`` to ``tensor``, or else to new memory."""
        self._places.setdefault(name, len(self._places))
        self._on_device.discard(name)
        if tensor is not None:
            self.io.bind_ortvalue_output(name, tensor.value)
            self._kept[name] = tensor
            return
        self._kept.pop(name, None)
        if self._place is None or to_host:
            self.io.bind_output(name, "cpu")
        else:
            self.io.bind_output(name, *self._place)
            self._on_device.add(name)

    def result(self, name: str) -> DeviceTensor:
        """Return what the last run wrote to the output ``name``."""
        if name in self._kept:
            return self._kept[name]
        # get_outputs() lists outputs in the order in which they were first bound.
        value = self.io.get_outputs()[self._places[name]]
        on_device = name in self._on_device
        array = None if on_device or value.element_type() != _BF16.onnx else _bits(value)
        return DeviceTensor(value, array, on_device=on_device)

    def stop(self) -> None:
        """End the run that another thread is in with this binding, or else the next one, with Cancelled."""
        self.stopped = self.options.terminate = True

    def resume(self) -> None:
        """Take ``stop`` back."""
        self.stopped = self.options.terminate = False


class _Runner:
    """What a DeviceMemory asks of ONNX Runtime, for ``device``, whose memory is at ``place``."""

    def __init__(self, place: Place, device: Device) -> None:
        self._place, self._device = place, device
        # OrtValues of other devices cannot be written to and read in every ONNX Runtime.
        self.writes = self.reads = place[0] in ("cpu", "cuda")

    def allocate(self, shape: Sequence[int], kind: DType) -> DeviceTensor:
        """Return new memory on the device, whatever it holds."""
        try:
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), kind.onnx, *self._place)
        except _ORT_ERRORS as error:
            what = f"get memory for {kind.name} {list(shape)} on the device {self._device.kind}"
            raise _not_run(error, what, self._device) from error
        return DeviceTensor(value, on_device=True)

    def tensor(self, array: Array) -> DeviceTensor:
        """Return a tensor that aliases ``array``, in main memory."""
        return _alias(array)

    def write(self, tensor: DeviceTensor, array: Array) -> None:
        """Copy ``array`` to ``tensor``, which ``allocate`` returned."""
        tensor.value.update_inplace(array)

    def read(self, tensor: DeviceTensor) -> Array:
        """Return a copy of the contents of ``tensor``, which ``allocate`` returned."""
        found: Array = np.array(tensor.value.numpy())
        return found

    def load(self, model: bytes) -> Any:
        """Return a session that runs ``model`` on the device's provider."""
        settings = _session_options({}, 1)
        # What looks alike is made once, which is not what several outputs are for.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(model, settings, **self._device.session_arguments(settings))

    def run(
        self, session: Any, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        """Run a graph that ``load`` returned on ``inputs`` which writes ``outputs``."""
        io = session.io_binding()
        for name, tensor in inputs.items():
            io.bind_ortvalue_input(name, tensor.value)
        for name, tensor in outputs.items():
            io.bind_ortvalue_output(name, tensor.value)
        try:
            session.run_with_iobinding(io)
        except _ORT_ERRORS as error:
            raise _not_run(
                error, f"prepare the states on the device {self._device.kind}", self._device
            ) from error


def run_once(graph: bytes, array: Array) -> Array:
    """Run ``graph``, whose input is x, on ``array``, on one thread of the CPU, and return its output.

    Raises ValueError if ONNX Runtime cannot.
    """
    settings = _session_options({}, 1)
    try:
        session = onnxruntime.InferenceSession(graph, settings, **CPU.session_arguments(settings))
        found: Array = session.run(None, {"x": array})[0]
    except _ORT_ERRORS as error:
        raise ValueError(one_line(error)) from error
    return found


def _not_run(error: Exception, what: str, device: Device) -> Error:
    """Return what to raise for ONNX Runtime's ``error`` at an attempt to do ``what``."""
    if "requires f16" in str(error):
        return NoDevice(
            f"the device {device.kind} does not compute in fp16 (shader-f16), which this folder asks for. Build "
            "the model with -p int4 or int8 and --extra_options use_webgpu_fp32=true, or use another device "
            "(--device cpu)."
        )
    return BadArtifact(f"ONNX Runtime could not {what}: {one_line(error)}")


def _alias(array: Array) -> DeviceTensor:
    """Return a tensor that aliases ``array``, in main memory, which must be contiguous."""
    if array.dtype == _BF16.numpy:
        # ONNX Runtime takes the bits only: numpy itself has no such type.
        bits = array.view(np.uint16)
        return DeviceTensor(onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BF16.onnx), array)
    return DeviceTensor(onnxruntime.OrtValue.ortvalue_from_numpy(array), array)


def _bits(value: Any) -> Array:
    """Return a copy of a value of bf16 in main memory, of which ONNX Runtime makes no array."""
    shape = tuple(value.shape())
    size = math.prod(shape)
    memory = (ctypes.c_uint16 * size).from_address(value.data_ptr()) if size else b""
    found: Array = np.frombuffer(memory, np.uint16, size).view(_BF16.numpy).reshape(shape).copy()
    return found


def _place(session: Any) -> Place | None:
    """Return where ``session`` computes, None if it reads and writes main memory only."""
    if session.get_providers()[0].startswith("CPU"):
        return None
    for info in (*session.get_output_memory_infos(), *session.get_input_memory_infos()):
        device = _DEVICES.get(info.name.partition("_")[0].lower())
        if device is not None:
            return device, info.device_id
        # What plugins for processors share with ONNX Runtime lies in main memory, OpenVINO_shared_CPU for example.
        if not info.name.lower().endswith("cpu") and "pinned" not in info.name.lower():
            raise BadOption(
                f"the memory {info.name!r} of {session.get_providers()[0]} is not known; known are "
                f"{', '.join(_DEVICES)} and cpu. Choose another device."
            )
    return None


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
    for key, value in {**_DEFAULTS, **found}.items():
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
