"""The tensors of a quantized checkpoint, from which the reader of a format takes those that make up a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.checkpoint.safetensors import FLOATS, Weight
from ortlm.dtypes import BY_NAME
from ortlm.errors import BadCheckpoint, UnsupportedModel

_NAMES = {name: kind.safetensors for name, kind in BY_NAME.items()}


@dataclass(frozen=True, slots=True)
class QuantizedTensors:
    """``tensors`` by name, ``config`` what says how they are quantized, and where that stands, for messages.

    A reader takes out what it understands and adds the weights that this makes.
    """

    tensors: dict[str, Weight]
    config: Mapping[str, Any]
    where: str

    def modules(self, part: str) -> list[str]:
        """Return the modules that have a tensor called ``part``."""
        end = f".{part}"
        return [name.removesuffix(end) for name in self.tensors if name.endswith(end)]

    def dtype(self, module: str, part: str) -> str | None:
        """Return the element type of a tensor of ``module``, None if it has none called ``part``."""
        found = self.tensors.get(f"{module}.{part}")
        return None if found is None else found.dtype.name

    def take(self, module: str, part: str, types: Iterable[str] = FLOATS) -> Weight | None:
        """Take a tensor of ``module`` out, None if there is none. Raises BadCheckpoint for another type."""
        found = self.tensors.pop(f"{module}.{part}", None)
        if found is not None and found.dtype.name not in types:
            raise BadCheckpoint(
                f"weight {shown(found.name)} in {found.file.name} has element type {found.dtype.safetensors}; "
                f"{self.where} implies {' or '.join(_NAMES[name] for name in types)}. One of the two belongs to "
                "another checkpoint."
            )
        return found

    def need(self, module: str, part: str, types: Iterable[str] = FLOATS, *, axes: int | None = 2) -> Weight:
        """Take a tensor of ``module`` out that has to be there, with so many axes. Raises BadCheckpoint."""
        found = self.take(module, part, types)
        if found is None:
            raise BadCheckpoint(
                f"weight {shown(f'{module}.{part}')} is missing, which {self.where} and the other tensors of "
                f"{shown(module)} imply. Usual cause: an incomplete download."
            )
        if axes is not None and (len(found.shape) != axes or 0 in found.shape):
            raise self.wrong(found, f"{axes} axes")
        return found

    def expect(self, weight: Weight, shape: tuple[int, ...]) -> Weight:
        """Return ``weight``. Raises BadCheckpoint unless it has this shape."""
        if weight.shape != shape:
            raise self.wrong(weight, str(list(shape)))
        return weight

    def wrong(self, weight: Weight, expected: str) -> BadCheckpoint:
        """Return the error for a tensor of another shape."""
        return BadCheckpoint(
            f"weight {shown(weight.name)} in {weight.file.name} has shape {list(weight.shape)}; {self.where} and "
            f"the other tensors of its module imply {expected}. Usual cause: a file of another checkpoint."
        )

    def drop(self, *parts: str) -> None:
        """Leave out tensors that say how activations are quantized, which change no weight."""
        for part in parts:
            for module in self.modules(part):
                del self.tensors[f"{module}.{part}"]

    def add(self, weight: Weight) -> None:
        """Add a weight. Raises BadCheckpoint if the checkpoint has another one of its name."""
        if weight.name in self.tensors:
            raise BadCheckpoint(
                f"weight {shown(weight.name)} is in the checkpoint twice, quantized and as a float tensor. One of "
                "the two belongs to another checkpoint."
            )
        self.tensors[weight.name] = weight

    def refused(self, key: str, value: object, allowed: str) -> UnsupportedModel:
        """Return the error for a ``value`` of the configuration that is not read."""
        return UnsupportedModel(
            f'{self.where}: "{key}" is {shown(value)}; ortlm reads {allowed}. Use the original checkpoint, or one '
            "in such a format."
        )


def as_vector(weight: Weight) -> Weight:
    """Return ``weight``, or, if it is a single number without axes, the same as a vector."""
    return weight if weight.shape else replace(weight, shape=(1,))
