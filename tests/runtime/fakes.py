"""A language model in numpy with the Backend protocol: one layer whose cache really matters."""

from __future__ import annotations

import numpy as np

from ortlm.artifact import Graph, State
from ortlm.dtypes import dtype
from ortlm.errors import BadArtifact, Cancelled
from ortlm.runtime.engine.backend import DeviceTensor, TensorInfo
from ortlm.runtime.engine.host_memory import HostMemory

VOCAB, HEADS, WIDTH = 11, 2, 3


class FakeBinding:
    def __init__(self):
        self.given, self.taken, self.bound, self.stopped = {}, {}, 0, False
        self.to_host = set()

    def input(self, name, tensor):
        self.given[name] = tensor
        self.bound += 1

    def input_array(self, name, array, address=None):
        self.input(name, DeviceTensor(None, array))

    def output(self, name, tensor, *, to_host=False):
        self.taken[name] = tensor
        self.bound += 1

    def result(self, name):
        return self.taken[name]

    def returned(self, name, array):
        self.taken[name] = DeviceTensor(None, array)

    def stop(self):
        self.stopped = True

    def resume(self):
        self.stopped = False


class CopyingBinding(FakeBinding):
    """Copies what lies in main memory when it is bound, as devices do."""

    def __init__(self):
        super().__init__()
        self.sources = {}

    def input(self, name, tensor):
        if not tensor.on_device:
            self.sources[name] = tensor.array
            tensor = on_device(tensor.array.copy())
        else:
            self.sources.pop(name, None)
        super().input(name, tensor)

    def output(self, name, tensor, *, to_host=False):
        super().output(name, tensor, to_host=to_host)
        (self.to_host.add if to_host else self.to_host.discard)(name)

    def returned(self, name, array):
        there = self.taken.get(name)
        if name in self.to_host or (there is not None and not there.on_device):
            super().returned(name, array)
        else:
            self.taken[name] = on_device(array)

    def check(self):
        """Fail if anything was written to what is bound, which the run that comes will not see."""
        for name, array in self.sources.items():
            assert np.array_equal(array, self.given[name].value), f"{name} was written to after it was bound"


def on_device(array):
    """Return a tensor whose contents the runtime cannot reach."""
    return DeviceTensor(array, on_device=True)


def contents(tensor):
    """Return what any tensor of the fakes holds."""
    return tensor.value if tensor.on_device else tensor.array


class FakeDeviceMemory(HostMemory):
    """Does as HostMemory does, with tensors that numpy cannot read, and always in new ones."""

    def __init__(self):
        super().__init__(lambda array: DeviceTensor(None, array), is_host=False)

    def put(self, array):
        return on_device(array.copy())

    def zeros(self, shapes, dtypes):
        return self._hidden(super().zeros(shapes, dtypes))

    def empty(self, shape, kind):
        return on_device(np.full(shape, np.nan, kind.numpy))

    def write(self, tensor, array):
        contents(tensor)[...] = array

    def resize(self, tensors, filled, capacity, *, axis=2, into=None):
        shown = self._shown(tensors)
        super().resize(shown, filled, capacity, axis=axis)
        if into is None:
            tensors[:] = self._hidden(shown)
            return
        for i, new in enumerate(into):
            self.write(new, shown[i].array)
            tensors[i] = new

    def take_rows(self, tensors, rows, *, filled, axis=2):
        shown = self._shown(tensors)
        super().take_rows(shown, rows, filled=filled, axis=axis)
        tensors[:] = self._hidden(shown)

    def move_rows(self, tensors, rows, *, filled, start=0):
        if not tensors or np.array_equal(rows, np.arange(len(contents(tensors[0])))):
            return False
        self.take_rows(tensors, rows, filled=filled)
        return True

    def read(self, tensors, start, stop, *, row=None, axis=2):
        found = super().read(self._shown(tensors), start, stop, row=row, axis=axis)
        return [array.copy() for array in found]

    def float32(self, tensor):
        return contents(tensor).astype(np.float32)

    def edit(self, tensors, change):
        shown = [DeviceTensor(None, contents(tensor).copy()) for tensor in tensors]
        super().edit(shown, change)
        tensors[:] = self._hidden(shown)
        return True

    def _shown(self, tensors):
        return [DeviceTensor(None, contents(tensor)) for tensor in tensors]

    def _hidden(self, tensors):
        return [on_device(tensor.array) for tensor in tensors]


class FakeBackend:
    """Keys are embeddings; logits are a sum over all keys so far, weighted by position.

    ``switch``: above this total length the weights are others, as with longrope.
    """

    # Whether backends are devices that copy what is bound; see conftest.py.
    device = False
    captures = False

    def __init__(self, kind="grow", *, all_logits=False, optional=True, width=WIDTH, switch=None):
        rng = np.random.default_rng(0)
        self.embedding = rng.normal(size=(VOCAB, HEADS, WIDTH)).astype(np.float32)
        self.head = rng.normal(size=(HEADS * WIDTH, VOCAB)).astype(np.float32)
        self.kind, self.all_logits, self.switch = kind, all_logits, switch
        self.runs: list[tuple[int, int]] = []
        self.memory = FakeDeviceMemory() if self.device else HostMemory(self.tensor)
        names = {"logits_to_keep": "logits_to_keep", "query_lengths": "query_lengths"} if optional else {}
        self.graph = Graph(
            file="fake.onnx",
            inputs={"input_ids": "input_ids", "attention_mask": "attention_mask"},
            outputs={"logits": "logits"},
            states=(State("past.key", "present.key", kind), State("past.value", "present.value", kind)),
            optional=names,
        )
        state = (None, HEADS, None, width)
        ids = TensorInfo("input_ids", dtype("int64"), (None, None))
        self.inputs = {
            "input_ids": ids,
            "attention_mask": ids,
            **{s.past: TensorInfo(s.past, dtype("fp32"), state) for s in self.graph.states},
        }
        self.outputs = {
            "logits": TensorInfo("logits", dtype("fp32"), (None, None, VOCAB)),
            **{s.present: TensorInfo(s.present, dtype("fp32"), state) for s in self.graph.states},
        }

    def tensor(self, array):
        assert array.flags.c_contiguous
        return DeviceTensor(None, array)

    def binding(self):
        return CopyingBinding() if self.device else FakeBinding()

    def release(self, capture):
        pass

    def run(self, binding, *, brief=False, capture=None):
        if binding.stopped:
            binding.stopped = False
            raise Cancelled("stopped")
        if self.device:
            binding.check()
        given = {name: contents(tensor) for name, tensor in binding.given.items()}
        ids, mask = given["input_ids"], given["attention_mask"]
        if given["past.key"].shape[3] != WIDTH:
            raise BadArtifact("wrong head size")
        rows, new = ids.shape
        total = mask.shape[1]
        self.runs.append((rows, new))
        ends = mask.sum(1)
        counts = np.minimum(new, ends)
        if (given.get("query_lengths", np.array([-1])) >= 0).all():
            counts = given["query_lengths"]
        starts = ends - counts
        for state, sign in zip(self.graph.states, (1, -2), strict=True):
            past = given[state.past]
            if self.kind == "grow":
                present = past
                assert contents(binding.taken[state.present]) is past
                assert past.shape[2] >= total
            else:
                assert binding.taken[state.present] is None or binding.bound > 0
                present = np.full((rows, HEADS, total, WIDTH), np.nan, np.float32)
                present[:, :, : past.shape[2]] = past
                binding.returned(state.present, present)
            for b in range(rows):
                for s in range(counts[b]):
                    present[b, :, starts[b] + s] = sign * self.embedding[ids[b, s]]
        keys = contents(binding.taken["present.key"])
        values = contents(binding.taken["present.value"])
        scale = 2.0 if self.switch is not None and total > self.switch else 1.0
        out = np.zeros((rows, new, VOCAB), np.float32)
        for b in range(rows):
            for s in range(counts[b]):
                n = starts[b] + s + 1
                weights = np.arange(1, n + 1)[None, :, None] * scale
                seen = (keys[b, :, :n] * weights + values[b, :, :n]).sum(1)
                out[b, s] = seen.reshape(-1).astype(np.float32) @ self.head / n
        keep = 0 if self.all_logits else int(given.get("logits_to_keep", np.array(1)))
        if keep == 1:
            out = out[np.arange(rows), counts - 1][:, None]
        elif keep:
            assert rows == 1
            out = out[:, -keep:]
        bound = binding.taken.get("logits")
        if bound is not None and contents(bound).shape == out.shape:
            contents(bound)[...] = out
        else:
            binding.returned("logits", out)
