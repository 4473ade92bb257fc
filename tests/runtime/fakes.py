"""A language model in numpy behind the Backend protocol: one layer whose cache really matters."""

from __future__ import annotations

import numpy as np

from ortlm.artifact import Graph, State
from ortlm.dtypes import dtype
from ortlm.errors import BadArtifact, Cancelled
from ortlm.runtime.engine.session import DeviceTensor, TensorInfo

VOCAB, HEADS, WIDTH = 11, 2, 3


class FakeBinding:
    def __init__(self):
        self.given, self.taken, self.bound, self.stopped = {}, {}, 0, False

    def input(self, name, tensor):
        self.given[name] = tensor
        self.bound += 1

    def input_array(self, name, array, address=None):
        self.given[name] = DeviceTensor(None, array)
        self.bound += 1

    def output(self, name, tensor):
        self.taken[name] = tensor
        self.bound += 1

    def result(self, name):
        return self.taken[name]

    def stop(self):
        self.stopped = True

    def go_on(self):
        self.stopped = False


class FakeBackend:
    """Keys are embeddings; logits are a sum over all keys so far, weighted by position.

    ``switch``: above this total length the weights are others, as with longrope.
    """

    def __init__(self, kind="grow", *, all_logits=False, optional=True, width=WIDTH, switch=None):
        rng = np.random.default_rng(0)
        self.embedding = rng.normal(size=(VOCAB, HEADS, WIDTH)).astype(np.float32)
        self.head = rng.normal(size=(HEADS * WIDTH, VOCAB)).astype(np.float32)
        self.kind, self.all_logits, self.switch = kind, all_logits, switch
        self.runs: list[tuple[int, int]] = []
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

    place = tensor

    def binding(self):
        return FakeBinding()

    def run(self, binding, *, brief=False):
        if binding.stopped:
            binding.stopped = False
            raise Cancelled("stopped")
        given = {name: tensor.array for name, tensor in binding.given.items()}
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
                assert binding.taken[state.present].array is past
                assert past.shape[2] >= total
            else:
                assert binding.taken[state.present] is None or binding.bound > 0
                present = np.full((rows, HEADS, total, WIDTH), np.nan, np.float32)
                present[:, :, : past.shape[2]] = past
                binding.taken[state.present] = DeviceTensor(None, present)
            for b in range(rows):
                for s in range(counts[b]):
                    present[b, :, starts[b] + s] = sign * self.embedding[ids[b, s]]
        keys = binding.taken["present.key"].array
        values = binding.taken["present.value"].array
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
        if bound is not None and bound.array.shape == out.shape:
            bound.array[...] = out
        else:
            binding.taken["logits"] = DeviceTensor(None, out)
