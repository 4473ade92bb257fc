"""ONNX Runtime's CPU provider behaving like a device: inputs are copied when bound, and states are hidden.

Models that run on it compute what they compute on the CPU, bit for bit, if nothing relies on main memory.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from ortlm.runtime.engine import session as engine
from ortlm.runtime.engine.backend import DeviceTensor
from ortlm.runtime.engine.device_memory import DeviceMemory
from ortlm.runtime.engine.devices import CPU

PLACE = ("cpu", 0)


class Runner(engine._Runner):
    """Gives memory full of values that are no numbers: what a graph reads of it shows.

    ``reads``: whether few numbers come over as they are, and not through a graph as many do.
    """

    def __init__(self, place, device, *, reads=False):
        super().__init__(place, device)
        self.reads = reads

    def allocate(self, shape, kind):
        tensor = super().allocate(shape, kind)
        ctypes.memset(tensor.value.data_ptr(), 0xFF, tensor.value.tensor_size_in_bytes())
        return tensor


class Binding(engine.OrtBinding):
    """Copies what lies in main memory when it is bound."""

    def __init__(self, io):
        super().__init__(io, PLACE)
        self._sources = {}
        self.bound = {}

    def input(self, name, tensor):
        self._sources.pop(name, None)
        self.bound[name] = tensor
        if not tensor.on_device:
            source = tensor.numpy()
            tensor = engine._alias(np.array(source, order="C"))
            self._sources[name] = source, tensor.array
        super().input(name, tensor)

    def input_array(self, name, array, address=None):
        assert address is None or address == array.ctypes.data
        self.input(name, DeviceTensor(None, array))

    def output(self, name, tensor, *, to_host=False):
        self.bound[name] = tensor
        super().output(name, tensor, to_host=to_host)

    def overwrite(self):
        """Do to the copies of what is bound what a captured run does that is launched again."""
        for name, (_, copy) in self._sources.items():
            # Stays in main memory.
            if "keep" not in name:
                copy.view(np.uint8)[...] = 0x7F

    def check(self):
        """Fail if anything was written to what is bound, which the run that comes will not see."""
        for name, (source, copy) in self._sources.items():
            assert source.tobytes() == copy.tobytes(), f"{name} was written to after it was bound"


class DeviceLikeSession(engine.Session):
    """A session whose states lie on a device that is the processor."""

    def __init__(self, *args, **options):
        self._may_capture = options.get("capture", False)
        super().__init__(*args, **options)
        self._place = PLACE
        self.memory = DeviceMemory(Runner(PLACE, CPU))

        self._captured = {}
        self._bindings = weakref.WeakSet()

    @property
    def captures(self):
        return self._may_capture

    def binding(self):
        binding = Binding(self._session.io_binding())
        self._bindings.add(binding)
        return binding

    def run(self, binding, *, brief=False, capture=None):
        binding.check()
        if capture is not None:
            assert all(tensor is not None and tensor.on_device for tensor in binding.bound.values())
            before = self._captured.setdefault(capture, (binding, dict(binding.bound)))
            assert before == (binding, binding.bound), "a captured run would not see what was bound again"
            for other in self._bindings:
                if other is not binding:
                    other.overwrite()
        super().run(binding, brief=brief)

    def release(self, capture):
        self._captured.pop(capture, None)
