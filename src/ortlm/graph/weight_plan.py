"""What a graph's weights are made of: which parameters go where and in which form. No data yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ortlm.dtypes import dtype
from ortlm.quant.algorithms import CALIBRATED
from ortlm.quant.scheme import Scheme
from ortlm.spec import Parameter


@dataclass(frozen=True, slots=True)
class Initializer:
    """One initializer: its name, element type and shape. Several may show the same bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        size = dtype(self.dtype).bytes
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True, slots=True)
class Plain:
    """``parameters``, one below the other, as ``tensor``; transposed from [out, in] if ``transposed``.

    ``interleaved`` n: the rows of n equal parts of them take turns.
    """

    parameters: tuple[str, ...]
    tensor: Initializer
    transposed: bool = False
    interleaved: int = 1

    @property
    def tensors(self) -> tuple[Initializer, ...]:
        """The initializers that this writes."""
        return (self.tensor,)


@dataclass(frozen=True, slots=True)
class Quantized:
    """``parameters``, one below the other (``rows`` by ``inputs``), quantized by ``scheme``.

    ``views`` are the initializers that show the packed codes, in any shape; all share the same bytes.
    ``interleaved`` n: the rows of n equal parts of the parameters take turns. It may hold several ``experts``;
    each computes a ``share`` of the tokens.
    """

    parameters: tuple[str, ...]
    scheme: Scheme
    rows: int
    inputs: int
    views: tuple[Initializer, ...]
    scales: Initializer
    zeros: Initializer | None
    interleaved: int = 1
    experts: int = 1
    share: float = 1.0

    @property
    def tensors(self) -> tuple[Initializer, ...]:
        """The initializers that own bytes: codes, scales and zero points."""
        return (self.views[0], self.scales, *([self.zeros] if self.zeros else []))


@dataclass(frozen=True, slots=True)
class Columns:
    """``parameters``, one below the other (``rows`` by ``inputs``), in 8 bits with a scale for each row.

    ``codes`` is int8 [inputs, rows], as integer matmuls want it, ``scales`` float32 [rows].
    """

    parameters: tuple[str, ...]
    rows: int
    inputs: int
    codes: Initializer
    scales: Initializer

    @property
    def tensors(self) -> tuple[Initializer, ...]:
        """The initializers that this writes."""
        return (self.codes, self.scales)


Item = Plain | Quantized | Columns


@dataclass(frozen=True, slots=True)
class LowRank:
    """Two inputs that a LoRA adapter gives: ``a`` [in, r] and ``b`` [r, out], with r = 0 if they are left out.

    What they add belongs to ``parameters``, one below the other, which make up ``out``.
    """

    parameters: tuple[Parameter, ...]
    a: str
    b: str


@dataclass(slots=True)
class Plan:
    """Everything that has to be written next to the graph.

    ``low_rank`` are the inputs that adapters may give; their data are files of their own.
    """

    items: list[Item] = field(default_factory=list)
    low_rank: list[LowRank] = field(default_factory=list)

    @property
    def calibrated(self) -> list[Quantized]:
        """The matrices whose codes depend on what the model reads."""
        return [i for i in self.items if isinstance(i, Quantized) and i.scheme.algorithm in CALIBRATED]

    @property
    def bytes(self) -> int:
        """Total size of the data, without alignment."""
        return sum(t.bytes for item in self.items for t in item.tensors)


def joined(plans: Iterable[Plan]) -> Plan:
    """Return the plan of one file for several graphs; what two of them use is stored once."""
    items: dict[str, Item] = {}
    low_rank: list[LowRank] = []
    for plan in plans:
        low_rank += plan.low_rank
        for item in plan.items:
            key = item.tensor.name if isinstance(item, Plain) else item.scales.name
            known = items.get(key)
            if isinstance(item, Quantized) and isinstance(known, Quantized):
                item = replace(known, views=tuple(dict.fromkeys((*known.views, *item.views))))
            items[key] = item
    return Plan(list(items.values()), low_rank)
