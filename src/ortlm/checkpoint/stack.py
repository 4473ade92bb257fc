"""Weights as the graph wants them: rows of several checkpoint tensors, one below the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array
from ortlm.errors import BadCheckpoint


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a tensor, with ``add`` added to every element."""

    weight: Weight
    start: int
    stop: int
    add: float = 0.0


@dataclass(frozen=True, slots=True)
class Stack:
    """Parts one below the other, seen as one matrix or vector of ``count`` rows."""

    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(p.stop - p.start for p in self.parts)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32.

        Raises BadCheckpoint if one of them is not a finite number.
        """
        found, at = [], 0
        for part in self.parts:
            height = part.stop - part.start
            low, high = max(start - at, 0), min(stop - at, height)
            if low < high:
                rows = part.weight.rows(part.start + low, part.start + high)
                _check_finite(rows, part.weight)
                found.append(rows + np.float32(part.add) if part.add else rows)
            at += height
        return found[0] if len(found) == 1 else np.concatenate(found)

    def columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop), transposed: float32 [stop - start, count]."""
        found = []
        for part in self.parts:
            columns = part.weight.columns(start, stop, slice(part.start, part.stop))
            _check_finite(columns, part.weight)
            found.append(columns + np.float32(part.add) if part.add else columns)
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def stack(parts: Sequence[Part]) -> Stack:
    """Return ``parts`` one below the other; neighbouring rows of one tensor become one part."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last and last.weight is part.weight and last.stop == part.start and last.add == part.add:
            merged[-1] = Part(part.weight, last.start, part.stop, part.add)
        else:
            merged.append(part)
    return Stack(tuple(merged))


def same(one: Weight, other: Weight) -> bool:
    """Whether two weights have the same shape and the same values."""
    if one.shape != other.shape:
        return False
    step = max(1, (1 << 19) // max(1, math.prod(one.shape[1:])))
    return all(
        np.array_equal(
            one.rows(at, min(at + step, one.shape[0])), other.rows(at, min(at + step, one.shape[0]))
        )
        for at in range(0, one.shape[0], step)
    )


def _check_finite(rows: Array, weight: Weight) -> None:
    # A sum is NaN or infinite if any element is, and takes one fast pass; only then look closer, since
    # finite numbers may overflow too.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(rows, dtype=np.float32)
    if not np.isfinite(total):
        bad = rows[~np.isfinite(rows)]
        if bad.size:
            raise BadCheckpoint(
                f"weight {weight.name!r} in {weight.file.name} holds {bad[0]} "
                f"({bad.size:,} such values were found at once): the checkpoint is damaged or training diverged."
            )
