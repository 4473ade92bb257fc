"""A model's weights by the names of its spec, wherever the checkpoint keeps them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from ortlm.checkpoint.peft import Delta
from ortlm.checkpoint.reader import Checkpoint
from ortlm.checkpoint.stack import Part, Stack, stack
from ortlm.dtypes import Array
from ortlm.errors import BadOption
from ortlm.quant.rotation import Rotation
from ortlm.spec import Architecture, Decoder


class RowReader(Protocol):
    """A matrix or vector that is read piece by piece."""

    @property
    def count(self) -> int:
        """Number of rows."""

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32."""


class Weights:
    """Every weight of a model, read when it is asked for.

    ``deltas`` is what a LoRA adapter adds, by name. With ``rotation`` the residual stream is turned by it:
    what goes into the stream is turned, what comes out of it is turned back, and norms hand their weights on
    to the matrices behind them, because only then can the stream be turned between. The model computes the same.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        deltas: Mapping[str, Delta] | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self.spec: Decoder = architecture.decoder
        self._checkpoint, self._architecture = checkpoint, architecture
        self._deltas = deltas or {}
        self._rotation = rotation
        self.shapes = {p.name: p.shape for p in architecture.parameters}
        if rotation is not None:
            check_rotatable(self.spec)

    def stack(self, names: Sequence[str]) -> RowReader:
        """Return the weights ``names``, one below the other."""
        found = self._plain(names)
        if self._rotation is None:
            return found
        part, _, kind = names[0].rpartition(".")
        role = part.rpartition(".")[2]
        if part.startswith("vision.") and part not in _PICTURES:
            return found
        if role in ("o", "down") or part in _PICTURES:
            return _Computed(found.count, lambda: self._turned_outputs(found))
        if role in ("mixer_pre", "ffn_pre", "final_norm"):
            return _Computed(found.count, lambda: np.ones(found.count, np.float32))
        if kind == "weight" and role in _BEHIND:
            norm = _BEHIND[role]
            before = part.rpartition(".")[0]
            if norm == "ffn_pre" and self.spec.layers[int(before.rpartition(".")[2])].parallel:
                norm = "mixer_pre"
            gain = self._plain([f"{before}.{norm}.weight" if before else f"{norm}.weight"])
            return _Turned(found, self._rotation, gain.rows(0, gain.count))
        return _Turned(found, self._rotation) if role == "embed" else found

    def read(self, names: Sequence[str]) -> Array:
        """Return the weights ``names``, one below the other, as float32."""
        found = self.stack(names)
        return found.rows(0, found.count)

    def _turned_outputs(self, found: Stack) -> Array:
        assert self._rotation is not None
        return self._rotation.outputs(found.rows(0, found.count))

    def _plain(self, names: Sequence[str]) -> Stack:
        return stack([self._part(name) for name in names])

    def _part(self, name: str) -> Part:
        source = self._architecture.sources[name]
        start, stop = source.rows or (0, self.shapes[name][0])
        weight = self._checkpoint.weights[source.tensor]
        if source.stored is not None:
            weight = replace(weight, shape=self.shapes[name])
        return Part(weight, start, stop, source.add, self._deltas.get(name), source.transposed)


# --- rotation -----------------------------------------------------------------------------------------------

# What makes embeddings of pictures, the last of the vision tower's matrices: it writes the residual stream.
_PICTURES = ("vision.join", "vision.join2")
# The norm before each matrix that reads the residual stream.
_BEHIND = {
    "q": "mixer_pre", "k": "mixer_pre", "v": "mixer_pre", "gate": "ffn_pre", "up": "ffn_pre", "head": "final_norm",
}  # fmt: skip


def check_rotatable(spec: Decoder) -> None:
    """Raise BadOption if the residual stream of ``spec`` cannot be turned without a change of what it computes."""
    why = None
    norms = [spec.final_norm]
    for layer in spec.layers:
        if layer.mixer_post is not None or layer.ffn_post is not None:
            why = "norms stand behind its layers' branches"
        if layer.mixer_pre is None or (layer.ffn_pre is None and not layer.parallel):
            why = "its layers read the stream without a norm"
        norms += [n for n in (layer.mixer_pre, layer.ffn_pre) if n is not None]
    if any(norm.kind != "rms" for norm in norms):
        why = "its norms subtract the mean"
    if spec.tied_head:
        why = "its head is tied to the embeddings, and only one of them takes the last norm's weights"
    if why is not None:
        raise BadOption(f"rotate does not apply to this model: {why}. Leave it out.")


class _Turned:
    """Rows that are multiplied by ``gain`` and turned."""

    def __init__(self, inner: Stack, rotation: Rotation, gain: Array | None = None) -> None:
        self._inner, self._rotation, self._gain = inner, rotation, gain

    @property
    def count(self) -> int:
        return self._inner.count

    def rows(self, start: int, stop: int) -> Array:
        found = self._inner.rows(start, stop)
        return self._rotation.rows(found if self._gain is None else found * self._gain)


class _Computed:
    """Rows that can only be computed all at once, which is done when the first is asked for."""

    def __init__(self, count: int, compute: Callable[[], Array]) -> None:
        self.count = count
        self._compute = compute
        self._lock = threading.Lock()
        self._found: Array | None = None
        self._left = count

    def rows(self, start: int, stop: int) -> Array:
        with self._lock:
            if self._found is None:
                self._found, self._left = self._compute(), self.count
            found = self._found[start:stop]
            self._left -= stop - start
            if self._left <= 0:
                self._found = None  # everything was read once: nobody asks again
        return found
