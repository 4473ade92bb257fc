"""Which weight gets which scheme. A recipe is a function; what to do is kept apart from how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ortlm.errors import BadOption, nearest
from ortlm.quant.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix sits: its ``role`` (see ``spec.Parameter``), its layer and how many layers there are.

    ``layer`` is None for embeddings and head. ``node`` is the name of the operator that uses the matrix,
    "/model/layers.0/attn/qkv_proj/MatMul" for example.
    """

    role: str
    node: str
    layer: int | None = None
    layers: int = 0


Recipe = Callable[[Place], Scheme | None]


@dataclass(frozen=True, slots=True)
class Uniform:
    """The same scheme for every linear layer, others for the head and the embeddings; None stays float."""

    body: Scheme | None
    head: Scheme | None
    embed: Scheme | None

    def __call__(self, place: Place) -> Scheme | None:
        """Return the scheme for ``place``."""
        return {"head": self.head, "embed": self.embed}.get(place.role, self.body)


@dataclass(frozen=True, slots=True)
class Mixed:
    """``base`` with 8 bits where rounding hurts most: queries, keys, values and down projections of some layers.

    The layers are the first and the last eighth, and every third between.
    Source: llama.cpp's Q4_K_M and onnxruntime-genai's k_quant_mixed use this rule.
    """

    base: Uniform

    def __call__(self, place: Place) -> Scheme | None:
        """Return the scheme for ``place``."""
        scheme = self.base(place)
        if scheme is None or place.layer is None or place.role not in ("qkv", "down"):
            return scheme
        i, n = place.layer, place.layers
        if i < n / 8 or i >= 7 * n / 8 or (i - round(n / 8)) % 3 == 2:
            return replace(scheme, bits=8)
        return scheme


@dataclass(frozen=True, slots=True)
class EightBit:
    """``base`` with 8 bits for some roles, the head for example."""

    base: Recipe
    roles: tuple[str, ...]

    def __call__(self, place: Place) -> Scheme | None:
        """Return the scheme for ``place``."""
        scheme = self.base(place)
        return replace(scheme, bits=8) if scheme is not None and place.role in self.roles else scheme


@dataclass(frozen=True, slots=True)
class Excluding:
    """``base``, but the operators named in ``nodes`` keep float weights."""

    base: Recipe
    nodes: frozenset[str]

    def __call__(self, place: Place) -> Scheme | None:
        """Return the scheme for ``place``."""
        return None if place.node in self.nodes else self.base(place)


RECIPES = ("uniform", "mixed")


def check_recipe(name: str) -> None:
    """Raise BadOption if there is no recipe called ``name``."""
    if name not in RECIPES:
        raise BadOption(
            f"there is no recipe {name!r}; there are {', '.join(RECIPES)}." + nearest(name, RECIPES)
        )
