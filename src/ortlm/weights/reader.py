"""A model's weights by the names of its spec, wherever the checkpoint keeps them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Protocol

import numpy as np

from ortlm.checkpoint.peft import Change
from ortlm.checkpoint.reader import Checkpoint
from ortlm.checkpoint.stack import Interleaved, Part, Stack, stack
from ortlm.dtypes import Array
from ortlm.errors import BadOption
from ortlm.quant.rotation import Rotation
from ortlm.spec import Architecture, Decoder, Experts

# Numbers that are read and converted at once.
_PIECE_NUMBERS = 1 << 19


class RowReader(Protocol):
    """A matrix or vector that is read piece by piece."""

    @property
    def count(self) -> int:
        """Number of rows."""

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32."""


class Weights:
    """Every weight of a model, read when it is asked for.

    ``changes`` is what LoRA adapters do to weights, by name. With ``rotation`` the residual stream is rotated by
    it: what goes into the stream is rotated, what comes out of it is rotated back, and norms hand their weights on
    to the matrices after them, because only then can the stream be rotated between. The model computes the same.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        changes: Mapping[str, tuple[Change, ...]] | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self.spec: Decoder = architecture.decoder
        self._checkpoint, self._architecture = checkpoint, architecture
        self._changes = changes or {}
        self._rotation = rotation
        self.parameters = {p.name: p for p in architecture.parameters}
        if rotation is not None:
            check_rotatable(self.spec)

    def stack(self, names: Sequence[str], *, interleaved: int = 1) -> RowReader:
        """Return the weights ``names``, one below the other.

        The rows of ``interleaved`` equal parts of them take turns.
        """
        if interleaved > 1:
            # Which are of experts: nothing rotates them.
            height = len(names) // interleaved
            return Interleaved(
                tuple(self._plain(names[i : i + height]) for i in range(0, len(names), height))
            )
        plain = self._plain(names)
        if self._rotation is None:
            return plain
        parameter = self.parameters[names[0]]
        part, layer = parameter.part, parameter.layer
        if parameter.vision and part not in _PROJECTORS:
            return plain
        if part in ("o", "down") or parameter.vision:
            return _Computed(plain.count, lambda: self._rotated_outputs(plain))
        if part in ("mixer_pre", "ffn_pre", "final_norm"):
            return _Computed(plain.count, lambda: np.ones(plain.count, np.float32))
        if parameter.kind == "weight" and part in _NORMS:
            norm = _NORMS[part]
            if norm == "ffn_pre" and layer is not None and self.spec.layers[layer].parallel:
                norm = "mixer_pre"
            gain = self._plain([replace(parameter, part=norm).name])
            return _Rotated(plain, self._rotation, gain.rows(0, gain.count))
        return _Rotated(plain, self._rotation) if part == "embed" else plain

    def read(self, names: Sequence[str]) -> Array:
        """Return the weights ``names``, one below the other, as float32."""
        rows = self.stack(names)
        return rows.rows(0, rows.count)

    def read_into(self, out: Array, names: Sequence[str], pool: Executor, start: int = 0) -> None:
        """Fill ``out`` float32 [rows, …] with rows from ``start`` on of the weights ``names``, using ``pool``.

        They are read and converted in pieces that stay in the processor's caches: faster than ``read``.
        """
        rows = self.stack(names)
        step = max(1, _PIECE_NUMBERS // max(1, math.prod(out.shape[1:])))

        def fill(low: int) -> None:
            high = min(low + step, len(out))
            out[low:high] = rows.rows(start + low, start + high)

        for _ in pool.map(fill, range(0, len(out), step)):
            pass

    def _rotated_outputs(self, plain: Stack) -> Array:
        assert self._rotation is not None
        return self._rotation.outputs(plain.rows(0, plain.count))

    def _plain(self, names: Sequence[str]) -> Stack:
        return stack([part for name in names for part in self._parts(name)])

    def _parts(self, name: str) -> list[Part]:
        source = self._architecture.sources[name]
        if source.below:
            each = [self._checkpoint.weights[tensor] for tensor in (source.tensor, *source.below)]
            return [Part(weight, 0, weight.shape[0], source.add - weight.added) for weight in each]
        whole = source.rows or (0, self.parameters[name].shape[0])
        weight = self._checkpoint.weights[source.tensor]
        if source.index is not None:
            weight = weight.at(source.index)
        if source.stored is not None:
            weight = replace(weight, shape=self.parameters[name].shape)
        add, changes = source.add - weight.added, self._changes.get(name, ())
        return [
            Part(weight, start, stop, add, changes, source.transposed, source.step)
            for start, stop in source.pieces or (whole,)
        ]


# --- rotation -----------------------------------------------------------------------------------------------

# The last matrix of the vision projector: what it gives are embeddings of images, on the residual stream.
_PROJECTORS = ("join", "join2")
# The norm before each matrix that reads the residual stream.
_NORMS = {
    "q": "mixer_pre", "k": "mixer_pre", "v": "mixer_pre", "in": "mixer_pre", "z": "mixer_pre",
    "a": "mixer_pre", "b": "mixer_pre",
    "gate": "ffn_pre", "up": "ffn_pre", "head": "final_norm",
}  # fmt: skip


def check_rotatable(spec: Decoder) -> None:
    """Raise BadOption if the residual stream of ``spec`` cannot be rotated while it computes the same."""
    why = None
    norms = [spec.final_norm]
    for layer in spec.layers:
        if layer.mixer_post is not None or layer.ffn_post is not None:
            why = "it has norms after its layers' branches"
        if layer.mixer_pre is None or (layer.ffn_pre is None and not layer.parallel):
            why = "its layers read the stream without a norm"
        if isinstance(layer.ffn, Experts):
            why = "it is a mixture of experts"
        norms += [n for n in (layer.mixer_pre, layer.ffn_pre) if n is not None]
    if any(norm.kind != "rms" for norm in norms):
        why = "its norms subtract the mean"
    if spec.tied_head:
        why = "its head is tied to the embeddings, and only one of them takes the last norm's weights"
    if why is not None:
        raise BadOption(f"rotate does not apply to this model: {why}. Leave it out.")


class _Rotated:
    """Rows that are multiplied by ``gain`` and rotated."""

    def __init__(self, inner: Stack, rotation: Rotation, gain: Array | None = None) -> None:
        self._inner, self._rotation, self._gain = inner, rotation, gain

    @property
    def count(self) -> int:
        return self._inner.count

    def rows(self, start: int, stop: int) -> Array:
        rows_read = self._inner.rows(start, stop)
        return self._rotation.rows(rows_read if self._gain is None else rows_read * self._gain)


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
            rows_kept = self._found[start:stop]
            self._left -= stop - start
            if self._left <= 0:
                self._found = None  # everything was read once: it is no longer needed
        return rows_kept
