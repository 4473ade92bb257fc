"""Choosing one device: against an ONNX Runtime that has whatever the test says."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ortlm.errors import BadOption, NoDevice
from ortlm.runtime.engine import device_list, devices
from ortlm.runtime.engine.device_kinds import KINDS, Wanted, check_options, parse_device, without_capture
from ortlm.runtime.engine.devices import CPU, CudaGpu, Device, DeviceRequest, choose_device


def ep_device(provider: str, kind: str = "GPU", number: int = 0, vendor: int = 1, **metadata: str) -> Any:
    """Return what ONNX Runtime lists of a plugin."""
    hardware = SimpleNamespace(
        type=f"OrtHardwareDeviceType.{kind}", device_id=number, vendor_id=vendor, vendor="Some", metadata={}
    )
    facts = {"library_path": f"/{provider}.so", "version": "1.2", **metadata}
    return SimpleNamespace(ep_name=provider, ep_metadata=facts, device=hardware)


@dataclass
class FakeOrt:
    """What devices.py uses of onnxruntime; ``plugins`` are the devices that a library brings, by its path."""

    providers: list[str] = field(default_factory=lambda: ["AzureExecutionProvider", "CPUExecutionProvider"])
    plugins: dict[str, list[Any]] = field(default_factory=dict)
    registered: dict[str, str] = field(default_factory=dict)
    preloads: int = 0
    says: str = ""
    __version__ = "1.32.0"

    def get_available_providers(self) -> list[str]:
        return self.providers

    def get_ep_devices(self) -> list[Any]:
        return [device for path in self.registered.values() for device in self.plugins[path]]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if path not in self.plugins:
            raise RuntimeError("cannot open\nthe library")
        self.registered[name] = path

    def unregister_execution_provider_library(self, name: str) -> None:
        del self.registered[name]

    def preload_dlls(self) -> None:
        self.preloads += 1
        print(self.says)


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    fake = FakeOrt()
    monkeypatch.setattr(devices, "onnxruntime", fake)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(devices, "installed_packages", lambda: ("onnxruntime",))
    monkeypatch.setattr(devices, "cuda_gpus", lambda: None)
    monkeypatch.setattr(device_list, "cuda_gpus", lambda: None)
    devices._preloaded.cache_clear()
    return fake


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    found = tuple(CudaGpu(f"Card {i}", 80 << 30) for i in range(count))
    for module in (devices, device_list):
        monkeypatch.setattr(module, "cuda_gpus", lambda: found)


def plugin(
    monkeypatch: pytest.MonkeyPatch, ort: FakeOrt, module: str, *found: Any, path: str = "/x.so"
) -> None:
    """Install a Python package with a plugin that brings the devices ``found``."""
    made = ModuleType(module)
    made.get_library_path = lambda: path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setattr(devices, "_is_installed", lambda name: name == module)
    ort.plugins[path] = list(found)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cpu", Wanted("cpu")),
        ("CPUExecutionProvider", Wanted("cpu")),
        ("CUDA", Wanted("cuda")),
        ("cuda:1", Wanted("cuda", "1")),
        ("WebGpuExecutionProvider", Wanted("webgpu")),
        ("openvino:NPU", Wanted("openvino", "NPU")),
        ("NvTensorRtRtx", Wanted("nvtensorrtrtx")),
        ("trt-rtx", Wanted("nvtensorrtrtx")),
        ("/opt/libx.so", Wanted("", None, "/opt/libx.so")),
        ("C:\\x.dll:2", Wanted("", "2", "C:\\x.dll")),
        ("libx.so.1.8.1:gpu", Wanted("", "gpu", "libx.so.1.8.1")),
    ],
)
def test_names(text: str, wanted: Wanted) -> None:
    assert parse_device(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", " ", "coda", "cuda/1", "cuda1", ":1", ":", "cpu ", "../x", "x" * 300, "x" * 5000 + ".so", 5, None],
)
def test_what_is_no_name(text: Any) -> None:
    with pytest.raises(BadOption, match="there is no device"):
        parse_device(text)


NUMBER = "a number from 0 on, as "
NUMBER_OR_TYPE = r"a number from 0 on or a type of device \(cpu, gpu, npu\), as "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (f"cuda:{x}", f"{NUMBER}cuda:0, found ")
            for x in ("", "x", "-1", "1.5", "01", "1:2", " 1", "1 ", "gpu")
        ),
        ("CUDA:x", NUMBER),
        ("cuda:1\n", "found '1\\\\n'"),
        (f"cuda:{'9' * 20}", NUMBER),
        ("dml:gpu", NUMBER),
        ("openvino:foo", f"{NUMBER_OR_TYPE}openvino:0, found 'foo'"),
        ("openvino:", "found ''"),
        ("openvino:gpu.0", NUMBER_OR_TYPE),
        ("mlx:-1", NUMBER_OR_TYPE),
        ("trt-rtx:x", f"{NUMBER_OR_TYPE}nvtensorrtrtx:0"),
        ("/opt/x.so:foo", f"{NUMBER_OR_TYPE}/opt/x.so:0"),
        ("some:foo", f"{NUMBER_OR_TYPE}some:0"),
        ("gpu:x", NUMBER),
        ("gpu:1", "Did you mean: cuda:1"),
        ("webgpu:1", "picks among the machine's GPUs by itself"),
        ("webgpu:", "picks among the machine's GPUs by itself"),
        ("cpu:1", "there is one CPU, found 'cpu:1'"),
        ("cpu:", "there is one CPU"),
    ],
)
def test_what_no_machine_has_is_told_before_what_this_one_lacks(
    text: str, message: str, ort: FakeOrt
) -> None:
    ort.providers.append("SomeExecutionProvider")
    with pytest.raises(BadOption, match=message) as caught:
        choose_device(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"), [("gpu", "cuda"), ("directml", "dml"), ("coda", "cuda"), ("openvin", "openvino")]
)
def test_nearest_name(text: str, meant: str) -> None:
    with pytest.raises(BadOption, match=f"Did you mean: {meant}"):
        parse_device(text)


def test_a_folder_names_no_library(ort: FakeOrt) -> None:
    with pytest.raises(BadOption, match="there is no device"):
        choose_device(None, built_for="/tmp/x.so")
    assert not ort.registered


def test_the_cpu(ort: FakeOrt) -> None:
    assert choose_device(None) == choose_device("cpu") == choose_device("cpu:0") == CPU
    assert CPU.session_arguments(None) == {"providers": ["CPUExecutionProvider"], "provider_options": [{}]}
    with pytest.raises(BadOption, match="there is one CPU"):
        choose_device("cpu:1")
    with pytest.raises(BadOption, match="for the CPU has no options, found 'x'"):
        choose_device(DeviceRequest("cpu", {"x": 1}))


def test_the_default_is_what_a_folder_was_built_for(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        NoDevice, match=r"OUT was built for webgpu, .*pip install 'onnxruntime-ep-webgpu' .*--device cpu"
    ):
        choose_device(None, built_for="webgpu", folder="OUT")
    with pytest.raises(NoDevice, match=r"^onnxruntime 1\.32\.0 has no webgpu; it has cpu\. Install it with"):
        choose_device("webgpu", built_for="cpu", folder="OUT")
    # Of a kind that nobody knows here.
    with pytest.raises(NoDevice, match=r"built for ryzenai.*has no ryzenai"):
        choose_device(None, built_for="RyzenAI", folder="OUT")
    assert choose_device("cpu", built_for="webgpu") == CPU
    gpus(monkeypatch, 1)
    ort.providers.append("CUDAExecutionProvider")
    assert choose_device(None, built_for="CUDAExecutionProvider").name == "cuda"


def test_cuda_by_number(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    ort.providers.append("CUDAExecutionProvider")
    with pytest.raises(NoDevice, match="no NVIDIA GPU is seen here: its driver is not installed"):
        choose_device("cuda")
    gpus(monkeypatch, 2)
    found = choose_device(DeviceRequest("cuda:1", {"use_tf32": False, "gpu_mem_limit": 1000}))
    options = {"use_tf32": "0", "gpu_mem_limit": "1000", "device_id": "1"}
    assert found == Device("cuda:1", "cuda", "CUDAExecutionProvider", 1, options)
    assert found.session_arguments(None) == {
        "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
        "provider_options": [{**options, "enable_cuda_graph": "0"}, {}],
    }
    assert found.captures
    assert found.session_arguments(None, capture=True)["provider_options"][0]["enable_cuda_graph"] == "1"
    assert not choose_device(DeviceRequest("cuda", {"enable_cuda_graph": False})).captures
    assert choose_device(DeviceRequest("cuda", {"device_id": 1})).name == "cuda:1"
    assert choose_device(DeviceRequest("cuda:1", {"device_id": "1"})).index == 1
    with pytest.raises(BadOption, match="cuda:0 and option device_id=1 name two devices"):
        choose_device(DeviceRequest("cuda:0", {"device_id": 1}))
    with pytest.raises(NoDevice, match="no device cuda:2: the driver shows 2 GPUs, from cuda:0 on"):
        choose_device("cuda:2")
    with pytest.raises(NoDevice, match="no device cuda:5: the driver shows 2 GPUs"):
        choose_device(DeviceRequest("cuda", {"device_id": 5}))
    with pytest.raises(BadOption, match="'cuda:npu' names no device"):
        choose_device("cuda:npu")
    # CUDA's libraries are looked for once, and what that prints does not appear.
    assert ort.preloads == 1


def test_what_cuda_lacks_is_told(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gpus(monkeypatch, 1)
    ort.providers.append("CUDAExecutionProvider")
    ort.says = "Failed to load libcudnn.so.9: not found\nPlease follow https://x"
    device = choose_device("cuda")
    assert capsys.readouterr().out == ""
    message = devices.not_started(device)
    assert "could not start CUDAExecutionProvider" in message
    assert "Failed to load libcudnn.so.9: not found CUDA's libraries come with: pip install" in message


def test_two_packages_hold_one_module(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "installed_packages", lambda: ("onnxruntime", "onnxruntime-gpu"))
    with pytest.raises(
        NoDevice, match=r"onnxruntime and onnxruntime-gpu are both installed.*force-reinstall"
    ):
        choose_device("cuda")


def test_a_plugin(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ep_device("WebGpuExecutionProvider")
    plugin(monkeypatch, ort, "onnxruntime_ep_webgpu", first, ep_device("WebGpuExecutionProvider", number=1))
    found = choose_device(DeviceRequest("webgpu", {"powerPreference": "low-power"}))
    assert ort.registered == {"webgpu": "/x.so"}
    seen: list[Any] = []
    settings = SimpleNamespace(add_provider_for_devices=lambda *given: seen.append(given))
    assert found.session_arguments(settings) == {}
    # Exactly one.
    assert seen == [([first], {"powerPreference": "low-power"})]
    with pytest.raises(
        BadOption, match=r"picks among the machine's GPUs by itself\. Say webgpu; option powerPref"
    ):
        choose_device("webgpu:1")


def test_most_tokens_of_shaders_for_vulkan(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "WebGpuExecutionProvider"
    plugin(monkeypatch, ort, "onnxruntime_ep_webgpu", ep_device(name, vendor=0x8086))
    assert choose_device("webgpu").most_tokens == 31
    assert CPU.most_tokens is None
    for system in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        assert choose_device("webgpu").most_tokens is None
    assert choose_device(DeviceRequest("webgpu", {"dawnBackendType": "Vulkan"})).most_tokens == 31
    monkeypatch.setattr(sys, "platform", "linux")
    assert choose_device(DeviceRequest("webgpu", {"dawnBackendType": "D3D12"})).most_tokens is None
    # The provider picks among them by itself.
    nvidia = ep_device(name, vendor=0x10DE)
    for others, most in (([], None), ([ep_device(name, vendor=0x1002)], 31)):
        path = next(iter(ort.registered.values()))
        ort.plugins[path] = [nvidia, *others]
        assert choose_device("webgpu").most_tokens == most


def test_one_of_several_of_a_plugin(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "OpenVINOExecutionProvider"
    there = [ep_device(name, "CPU"), ep_device(name, number=7, vendor=8), ep_device(name, number=9, vendor=8)]
    other = ep_device(f"{name}.AUTO")
    plugin(monkeypatch, ort, "onnxruntime_ep_openvino", there[0], other)
    assert choose_device("openvino").ep_device is there[0]
    # Else it computes in bf16 on processors that can.
    assert "f32" in choose_device("openvino").options["load_config"]
    assert choose_device(DeviceRequest("openvino", {"load_config": "{}"})).options == {"load_config": "{}"}
    ort.plugins["/x.so"] = [*there, other]
    with pytest.raises(BadOption, match=r"several devices openvino: openvino:0 \(openvino:cpu\), openvino:1"):
        choose_device("openvino")
    assert choose_device("openvino:2").ep_device is there[2]
    assert choose_device("openvino:2").options == {}
    assert choose_device("openvino:cpu").name == "openvino:cpu"
    with pytest.raises(NoDevice, match="are several openvino:gpu"):
        choose_device("openvino:gpu")
    with pytest.raises(NoDevice, match="is no openvino:npu"):
        choose_device("openvino:npu")
    with pytest.raises(NoDevice, match="no device openvino:3: this machine has 3"):
        choose_device("openvino:3")
    request = DeviceRequest("openvino", {}, {"hardware_device_type": "gpu", "hardware_device_id": 9})
    assert choose_device(request).ep_device is there[2]
    with pytest.raises(
        NoDevice, match="no device openvino has hardware_vendor_id=3; there are: hardware_device_"
    ):
        choose_device(DeviceRequest("openvino", {}, {"hardware_vendor_id": 3}))
    with pytest.raises(
        BadOption, match="hardware_vendor_id is for devices of plugins; device cpu is chosen by"
    ):
        choose_device(DeviceRequest("cpu", {}, {"hardware_vendor_id": 3}))


def test_a_plugin_that_finds_nothing(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, ort, "onnxruntime_ep_webgpu")
    with pytest.raises(
        NoDevice, match=r"onnxruntime-ep-webgpu is installed and finds no device.*libvulkan\.so\.1"
    ):
        choose_device("webgpu")
    del ort.plugins["/x.so"]
    ort.registered.clear()
    with pytest.raises(NoDevice, match="is installed and does not load: ONNX Runtime cannot load"):
        choose_device("webgpu")


def test_a_plugin_of_any_name(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that a program registered, and a library by its path."""
    ort.plugins["/f.so"] = [ep_device("FancyExecutionProvider")]
    devices.register_provider_library("whatever", "/f.so")
    found = choose_device(DeviceRequest("fancy", {"x": True}))
    assert (found.provider, found.options) == ("FancyExecutionProvider", {"x": "1"})
    devices.unregister_provider_library("whatever")
    with pytest.raises(BadOption, match="no device 'fancy'"):
        choose_device("fancy")
    with pytest.raises(BadOption, match="no library for 'whatever'"):
        devices.unregister_provider_library("whatever")


def test_a_library_by_its_path(ort: FakeOrt, tmp_path: Path) -> None:
    library = tmp_path / "libfancy.so"
    with pytest.raises(
        BadOption, match="is not a file; --device takes the name of a device or a provider's lib"
    ):
        choose_device(str(library))
    library.write_bytes(b"")
    with pytest.raises(BadOption, match="cannot open the library"):
        choose_device(str(library))
    ort.plugins[str(library)] = [
        ep_device("FancyExecutionProvider", number=i, library_path=str(library)) for i in range(2)
    ]
    assert choose_device(f"{library}:1").index == 1
    assert choose_device(f"{library}:0").name == "fancy:0"
    assert list(ort.registered) == ["libfancy.so"]


def test_options_are_known_by_name() -> None:
    cuda, webgpu = KINDS["cuda"], KINDS["webgpu"]
    assert check_options(cuda, {"use_tf32": "false", "user_compute_stream": "0"}) == {"use_tf32": "0"}
    for kind, key, value, message in (
        (cuda, "use_tf23", "1", "device cuda has no option 'use_tf23'.*Did you mean: use_tf32"),
        (cuda, "use_tf32", "maybe", "use_tf32 of device cuda takes 0 or 1, found 'maybe'"),
        (cuda, "gpu_mem_limit", -1, "takes a whole number from 1 on"),
        (webgpu, "enableGraphCapture", True, "runs are not captured"),
        (cuda, "user_compute_stream", "5", "an address within a C program"),
        (webgpu, "kvCacheQuantizationBits", 4, "it changes the layout of a cache"),
        (webgpu, "validationMode", "most", "takes one of disabled, wgpuOnly"),
        (KINDS["openvino"], "device_type", "GPU", "chosen by its name, as openvino:gpu"),
    ):  # fmt: skip
        with pytest.raises(BadOption, match=message):
            check_options(kind, {key: value})
    # Nobody knows these here; ONNX Runtime does.
    assert check_options(KINDS["qnn"], {"backend_path": "x"}) == {"backend_path": "x"}


def test_options_of_a_folder(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go with its own kind of device only; captures, which change nothing, are left out; callers win."""
    gpus(monkeypatch, 1)
    ort.providers.append("CUDAExecutionProvider")
    theirs = {"enable_cuda_graph": "1", "enable_skip_layer_norm_strict_mode": "1"}
    assert without_capture(theirs) == {"enable_skip_layer_norm_strict_mode": "1"}
    found = choose_device(None, built_for="cuda", built_options=theirs)
    assert found.options == {"enable_skip_layer_norm_strict_mode": "1", "device_id": "0"}
    request = DeviceRequest(None, {"enable_skip_layer_norm_strict_mode": 0})
    found = choose_device(request, built_for="cuda", built_options=theirs)
    assert found.options["enable_skip_layer_norm_strict_mode"] == "0"
    assert choose_device("cpu", built_for="cuda", built_options=theirs) == CPU


def test_the_list(ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, tuple[bool, str | None]]:
        return {device.name: (device.ready, device.missing) for device in device_list.list_devices()}

    first = found()
    assert list(first) == ["cpu", "cuda", "webgpu", "openvino", "qnn", "nvtensorrtrtx"]
    assert first["cpu"] == (True, None)
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(first["cuda"][1])
    gpus(monkeypatch, 2)
    ort.providers.append("CUDAExecutionProvider")
    name = "OpenVINOExecutionProvider"
    there = ep_device(name, "CPU", FULL_DEVICE_NAME="A processor"), ep_device(name, "NPU")
    plugin(monkeypatch, ort, "onnxruntime_ep_openvino", *there)
    second = found()
    assert [key for key, (ready, _) in second.items() if ready] == [
        "cpu", "cuda:0", "cuda:1", "openvino:0", "openvino:1"
    ]  # fmt: skip
    described = {device.name: device for device in device_list.list_devices()}
    assert described["openvino:0"].what == "A processor (CPU)"
    assert described["cuda:1"].memory_bytes == 80 << 30


def test_of_this_machine() -> None:
    """With the real ONNX Runtime."""
    found = device_list.list_devices()
    assert found[0].name == "cpu"
    assert found[0].ready
    assert not next(device for device in found if device.name.startswith("cuda")).ready or devices.cuda_gpus()
