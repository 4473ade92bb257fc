"""States on a device that are used again, and steps on them that the device has recorded as a whole.

To launch a step's kernels one by one takes the processor longer than the device needs to run them. A captured step
is launched as one. It reads and writes at the places that it was captured with, so those belong to the states.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from ortlm.artifact import Graph
from ortlm.dtypes import dtype
from ortlm.runtime.engine.backend import Backend, Binding, DeviceTensor
from ortlm.runtime.engine.bound_inputs import BoundRun, integer_types
from ortlm.runtime.engine.states import bind_in_place

# States that wait to be used again.
_KEPT = 2
# States this much longer than what is asked for do as well.
_LONGER = 4
# A capture takes a few steps' time, and states that beams take apart after every step never earn it.
_STEPS_BEFORE = 2
# So many runs are captured in a session at most: a provider may keep what it has captured as long as that.
_MOST_CAPTURES = 64
_FED = {"input_ids", "attention_mask", "position_ids"}


class StepStates:
    """Tensors of states for ``rows`` and ``capacity`` positions, with runs and captured steps on them."""

    def __init__(self, tensors: list[DeviceTensor], rows: int, capacity: int, pool: StatePool) -> None:
        self.tensors, self.rows, self.capacity = tensors, rows, capacity
        self._pool = pool
        self._steps: dict[int, CapturedStep] = {}
        self._waited = 0
        self._bound: BoundRun | None = None

    def bound(self, graph: Graph) -> BoundRun:
        """Return a run of ``graph`` that has these states bound, and whatever else an earlier one had."""
        if self._bound is None:
            self._bound = self._pool.bind(graph, self)
        return self._bound

    def binds(self, binding: Binding) -> bool:
        """Return whether ``binding`` is that of ``bound``."""
        return self._bound is not None and self._bound.binding is binding

    def step(self, graph: Graph, total: int, most: int) -> CapturedStep | None:
        """Return the step for rows of up to ``total`` tokens whose mask has ``most`` columns at most.

        None if it is not worth it yet, or if the graph takes what a captured step has not.
        """
        width = min(self.capacity, most)
        found = self._steps.get(width)
        if found is None and width >= total:
            self._waited += 1
            if self._waited > _STEPS_BEFORE:
                found = self._pool.capture(graph, self, width)
                if found is not None:
                    self._steps[width] = found
        return found if width >= total else None

    def release(self) -> None:
        """Let go of all memory."""
        for step in self._steps.values():
            step.release()
        self._steps, self.tensors, self._bound = {}, [], None


class CapturedStep:
    """One token for each row on the states of ``states``, with a mask of ``width`` columns, zeros at its end."""

    def __init__(self, backend: Backend, graph: Graph, states: StepStates, width: int, number: int) -> None:
        self._backend, self._number, self._width = backend, number, width
        self._binding = backend.binding()
        memory, rows, types = backend.memory, states.rows, integer_types(backend, graph)
        bind_in_place(self._binding, graph.states, states.tensors)
        columns = {role: width if role == "attention_mask" else 1 for role in graph.inputs}
        self._given = {role: np.zeros((rows, count), types[role]) for role, count in columns.items()}
        self._tensors = {
            role: memory.empty(array.shape, dtype(array.dtype.name)) for role, array in self._given.items()
        }
        for role, tensor in self._tensors.items():
            self._binding.input(graph.inputs[role], tensor)
        info = backend.outputs[graph.outputs["logits"]]
        assert info.shape[2] is not None
        self._logits = memory.empty((rows, 1, info.shape[2]), info.dtype)
        self._binding.output(graph.outputs["logits"], self._logits)
        self._places = np.arange(width)

    def run(self, tokens: Sequence[int], ends: Sequence[int]) -> DeviceTensor:
        """Feed a token to each row, which has ``ends[i]`` tokens then; return logits [B, 1, V].

        The next run writes others to the same memory.
        """
        given, lengths = self._given, np.array(ends)[:, None]
        given["input_ids"][:, 0] = tokens
        np.less(self._places, lengths, out=given["attention_mask"], casting="unsafe")
        if "position_ids" in given:
            given["position_ids"][...] = lengths - 1
        for role, tensor in self._tensors.items():
            self._backend.memory.write(tensor, given[role])
        self._backend.run(self._binding, brief=True, capture=self._number)
        return self._logits

    def release(self) -> None:
        """Forget what was captured."""
        self._backend.release(self._number)


class StatePool:
    """States of a session's model that nobody uses, of which those used last are kept. For several threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # Whoever is asked for memory may find that memory is given back meanwhile.
        self._lock = threading.RLock()
        self._free: list[StepStates] = []
        self._numbers = itertools.count(1)

    def take(
        self, rows: int, capacity: int, make: Callable[[], list[DeviceTensor]], *, most: int
    ) -> StepStates:
        """Return states for ``rows`` and at least ``capacity`` positions, ``most`` at most.

        Old ones, or else what ``make`` returns for ``capacity``. What they hold means nothing, but it is numbers.
        """
        found = self.old(rows, capacity, most=most)
        if found is not None:
            return found
        try:
            return StepStates(make(), rows, capacity, self)
        except Exception:
            # Every provider has its own error for too little memory.
            if not self._free:
                raise
            self.clear()
            return StepStates(make(), rows, capacity, self)

    def old(self, rows: int, capacity: int, *, most: int) -> StepStates | None:
        """Return states that are there already, None if none fit."""
        with self._lock:
            fit = [
                states
                for states in self._free
                if states.rows == rows and capacity <= states.capacity <= min(most, _LONGER * capacity)
            ]
            if not fit:
                return None
            best = min(fit, key=lambda states: states.capacity)
            self._free.remove(best)
            return best

    def give(self, states: StepStates) -> None:
        """Take back states that nobody uses any more."""
        with self._lock:
            self._free.append(states)
            gone = [self._free.pop(0) for _ in range(len(self._free) - _KEPT)]
        for old in gone:
            old.release()

    def clear(self) -> None:
        """Let go of all states that wait."""
        with self._lock:
            gone, self._free = self._free, []
        for states in gone:
            states.release()

    def bind(self, graph: Graph, states: StepStates) -> BoundRun:
        """Return a run that reads and writes ``states``, which are all that ``graph`` has."""
        bound = BoundRun(self._backend, graph)
        bind_in_place(bound.binding, graph.states, states.tensors)
        return bound

    def capture(self, graph: Graph, states: StepStates, width: int) -> CapturedStep | None:
        """Return a step on ``states`` that runs of the session capture, None if it cannot be one."""
        backend = self._backend
        fed = {*graph.inputs.values(), *(state.past for state in graph.states)}
        if (
            not backend.captures
            or not graph.inputs.keys() <= _FED
            or not backend.inputs.keys() <= fed
            or len(graph.states) != len(states.tensors)
            or backend.outputs[graph.outputs["logits"]].shape[2] is None
        ):
            return None
        number = next(self._numbers)
        return CapturedStep(backend, graph, states, width, number) if number <= _MOST_CAPTURES else None
