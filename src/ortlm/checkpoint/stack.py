"""Weights as the graph wants them: rows of several checkpoint tensors, one below the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ortlm.checkpoint.peft import Change, Replacement
from ortlm.checkpoint.quantized_weight import Codes, Grid, QuantizedWeight, TransposedWeight
from ortlm.checkpoint.safetensors import Weight, check_finite
from ortlm.dtypes import Array


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a tensor, with ``add`` added to every element and ``changes`` made to them in order.

    ``transposed``: the tensor's columns are meant. With ``step`` n it is every n-th row, and rows are counted so.
    """

    weight: Weight
    start: int
    stop: int
    add: float = 0.0
    changes: tuple[Change, ...] = ()
    transposed: bool = False
    step: int = 1

    @property
    def count(self) -> int:
        """Number of rows."""
        return -(-(self.stop - self.start) // self.step)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the part as float32."""
        low, high = self.start + self.step * start, self.start + self.step * (stop - 1) + 1
        found = self.weight.columns(low, high) if self.transposed else self.weight.rows(low, high)
        if self.step > 1:
            found = np.ascontiguousarray(found[:: self.step])
        check_finite(found, self.weight)
        base = found
        for change in self.changes:
            if isinstance(change, Replacement):
                found = base = change.rows(low, len(found))
            else:
                found = change.applied(found, base, low)
        return found + np.float32(self.add) if self.add else found

    def codes(self, start: int, stop: int, grid: Grid) -> Codes:
        """Return rows [start, stop) on ``grid``; see ``QuantizedWeight.codes``. Nothing changes the part."""
        weight = self.weight
        if self.transposed:
            assert isinstance(weight, TransposedWeight)
            weight = weight.inner
        assert isinstance(weight, QuantizedWeight)
        assert not self.add
        assert not self.changes
        found = weight.codes(self.start + self.step * start, self.start + self.step * (stop - 1) + 1, grid)
        if self.step == 1:
            return found
        zeros = None if found.zeros is None else found.zeros[:: self.step]
        return Codes(found.codes[:: self.step], found.scales[:: self.step], zeros)


@dataclass(frozen=True, slots=True)
class Stack:
    """Parts one below the other, seen as one matrix or vector of ``count`` rows."""

    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(p.count for p in self.parts)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32.

        Raises BadCheckpoint if one of them is not a finite number.
        """
        found = [part.rows(low, high) for part, low, high in self._within(start, stop)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def codes(self, start: int, stop: int, grid: Grid) -> Codes:
        """Return rows [start, stop) on ``grid``, as the checkpoint has them; see ``QuantizedWeight.codes``."""
        found = [part.codes(low, high, grid) for part, low, high in self._within(start, stop)]
        zeros = [part.zeros for part in found if part.zeros is not None]
        return Codes(
            np.concatenate([part.codes for part in found]),
            np.concatenate([part.scales for part in found]),
            np.concatenate(zeros) if zeros else None,
        )

    def _within(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Yield the parts that rows [start, stop) lie in, with the rows of each."""
        at = 0
        for part in self.parts:
            height = part.count
            low, high = max(start - at, 0), min(stop - at, height)
            if low < high:
                yield part, low, high
            at += height


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Stacks of equal height whose rows take turns: the first of each, then the second of each, and so on."""

    stacks: tuple[Stack, ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(stack.count for stack in self.stacks)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32; see ``Stack.rows``."""
        turns = len(self.stacks)
        low, high = start // turns, -(-stop // turns)
        found = np.stack([stack.rows(low, high) for stack in self.stacks], axis=1)
        return found.reshape(-1, *found.shape[2:])[start - turns * low : stop - turns * low]

    def codes(self, start: int, stop: int, grid: Grid) -> Codes:
        """Return rows [start, stop) on ``grid``; see ``Stack.codes``."""
        turns = len(self.stacks)
        low, high = start // turns, -(-stop // turns)
        found = [stack.codes(low, high, grid) for stack in self.stacks]

        def woven(parts: Sequence[Array]) -> Array:
            both = np.stack(parts, axis=1)
            return both.reshape(-1, *both.shape[2:])[start - turns * low : stop - turns * low]

        zeros = [part.zeros for part in found if part.zeros is not None]
        return Codes(
            woven([part.codes for part in found]),
            woven([part.scales for part in found]),
            woven(zeros) if zeros else None,
        )


def stack(parts: Sequence[Part]) -> Stack:
    """Return ``parts`` one below the other; neighbouring rows of one tensor become one part."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if (
            last
            and part.step == 1
            and part == replace(last, start=part.start, stop=part.stop)
            and last.stop == part.start
        ):
            merged[-1] = replace(part, start=last.start)
        else:
            merged.append(part)
    return Stack(tuple(merged))
