"""ONNX Runtime's CPU provider behaving like a device: inputs are copied when bound, and states are hidden.

Models that run on it compute what they compute on the CPU, bit for bit, if nothing relies on main memory.
"""

from __future__ import annotations

import ctypes

import numpy as np

from ortlm.runtime.engine import session as engine
from ortlm.runtime.engine.backend import DeviceTensor
from ortlm.runtime.engine.device_memory import DeviceMemory
from ortlm.runtime.engine.devices import CPU

PLACE = ("cpu", 0)


class Runner(engine._Runner):
    """Gives memory full of values that are no numbers: what a graph reads of it shows."""

    def allocate(self, shape, kind):
        tensor = super().allocate(shape, kind)
        ctypes.memset(tensor.value.data_ptr(), 0xFF, tensor.value.tensor_size_in_bytes())
        return tensor


class Binding(engine.OrtBinding):
    """Copies what lies in main memory when it is bound."""

    def __init__(self, io):
        super().__init__(io, PLACE)
        self._sources = {}

    def input(self, name, tensor):
        self._sources.pop(name, None)
        if not tensor.on_device:
            source = tensor.numpy()
            tensor = engine._alias(np.array(source, order="C"))
            self._sources[name] = source, tensor.array
        super().input(name, tensor)

    def input_array(self, name, array, address=None):
        assert address is None or address == array.ctypes.data
        self.input(name, DeviceTensor(None, array))

    def check(self):
        """Fail if anything was written to what is bound, which the run that comes will not see."""
        for name, (source, copy) in self._sources.items():
            assert source.tobytes() == copy.tobytes(), f"{name} was written to after it was bound"


class DeviceLikeSession(engine.Session):
    """A session whose states lie on a device that is the processor."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._place = PLACE
        self.memory = DeviceMemory(Runner(PLACE, CPU))

    def binding(self):
        return Binding(self._session.io_binding())

    def run(self, binding, *, brief=False):
        binding.check()
        super().run(binding, brief=brief)
