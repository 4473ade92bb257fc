"""Which weight gets which scheme: recipes are data, and what follows from one is a function of the place."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ortlm.errors import BadOption
from ortlm.quant.scheme import Scheme

# Roles of matrices, as in ``spec.Parameter``.
ROLES = ("embed", "head", "qkv", "out", "gate_up", "down", "experts", "per_layer_embed", "vision")
# The layers that suffer most: the first and the last eighth, and every third between.
# Source: llama.cpp's Q4_K_M and onnxruntime-genai's k_quant_mixed use this rule.
SENSITIVE = "sensitive"


@dataclass(frozen=True, slots=True)
class MatrixLocation:
    """Where a matrix sits: its ``role`` (see ``spec.Parameter``), its layer and how many layers there are.

    ``layer`` is None for embeddings and head. ``node`` is the name of the operator that uses the matrix,
    "/model/layers.0/attn/qkv_proj/MatMul" for example. ``weights`` is how many numbers the matrix holds,
    ``inputs`` how many of them in a row; ``parameters`` are the names of the weights that it is made of.
    """

    role: str
    node: str
    layer: int | None = None
    layers: int = 0
    weights: int = 0
    inputs: int = 0
    parameters: tuple[str, ...] = ()


Recipe = Callable[[MatrixLocation], Scheme | None]


@dataclass(frozen=True, slots=True)
class Uniform:
    """The same scheme for every linear layer, others for head, embeddings and vision; None stays float."""

    body: Scheme | None
    head: Scheme | None
    embed: Scheme | None
    vision: Scheme | None = None

    def __call__(self, place: MatrixLocation) -> Scheme | None:
        """Return the scheme for ``place``."""
        others = {"head": self.head, "embed": self.embed, "vision": self.vision}
        return others.get(place.role, self.body)


@dataclass(frozen=True, slots=True)
class Keeping:
    """``base``, but matrices whose weights are all in ``schemes`` keep the codes and scales of the checkpoint.

    ``schemes`` is what holds a weight exactly, by its name. Where the weights of a matrix differ, it gets what
    holds all of them: the most bits, the smallest blocks, and zeros if one of them has any.
    """

    base: Recipe
    schemes: Mapping[str, Scheme]

    def __call__(self, place: MatrixLocation) -> Scheme | None:
        """Return the scheme for ``place``."""
        if not place.parameters or not all(name in self.schemes for name in place.parameters):
            return self.base(place)
        first, *others = (self.schemes[name] for name in place.parameters)
        for other in others:
            first = replace(
                first,
                bits=max(first.bits, other.bits),
                block=min(first.block, other.block),
                symmetric=first.symmetric and other.symmetric,
                scales="fp32" if "fp32" in (first.scales, other.scales) else first.scales,
            )
        return first


@dataclass(frozen=True, slots=True)
class Rule:
    """What the matrices at some places get instead; None leaves a field as it is.

    It holds where every condition does that is given: ``roles``; ``layers``, numbers of which negative ones count
    from the end, or "sensitive"; ``nodes``, names of operators in which ``*`` stands for anything;
    ``at_most``, the number of weights in the matrix; ``at_most_inputs``, that in a row of it. ``bits`` 0 keeps the
    weights float.
    """

    roles: tuple[str, ...] = ()
    layers: tuple[int, ...] | str | None = None
    nodes: tuple[str, ...] = ()
    at_most: int | None = None
    at_most_inputs: int | None = None
    bits: int | None = None
    block: int | None = None
    symmetric: bool | None = None
    algorithm: str | None = None

    def holds(self, place: MatrixLocation) -> bool:
        """Return whether ``place`` is meant."""
        if self.roles and place.role not in self.roles:
            return False
        if self.nodes and not any(fnmatch.fnmatchcase(place.node, pattern) for pattern in self.nodes):
            return False
        if self.at_most is not None and place.weights > self.at_most:
            return False
        if self.at_most_inputs is not None and place.inputs > self.at_most_inputs:
            return False
        if self.layers is None:
            return True
        if place.layer is None:
            return False
        i, n = place.layer, place.layers
        if isinstance(self.layers, str):
            return i < n / 8 or i >= 7 * n / 8 or (i - round(n / 8)) % 3 == 2
        return i in self.layers or i - n in self.layers


@dataclass(frozen=True, slots=True)
class Ruled:
    """``base``, changed by each rule that holds, one after the other: later ones win."""

    base: Recipe
    rules: tuple[Rule, ...]

    def __call__(self, place: MatrixLocation) -> Scheme | None:
        """Return the scheme for ``place``."""
        scheme = self.base(place)
        for rule in self.rules:
            if rule.holds(place):
                scheme = _changed(scheme, rule)
        return scheme


def _changed(scheme: Scheme | None, rule: Rule) -> Scheme | None:
    if rule.bits == 0 or scheme is None:
        return None
    return replace(
        scheme,
        bits=scheme.bits if rule.bits is None else rule.bits,
        block=scheme.block if rule.block is None else rule.block,
        symmetric=scheme.symmetric if rule.symmetric is None else rule.symmetric,
        algorithm=rule.algorithm or scheme.algorithm,
    )


# Up to this many weights in a matrix, quality counts for more than the time of a step. The figures behind it are
# in docs/quantization-results.md.
SMALL = 8_000_000
# Blocks of 32 lose a third less than blocks of 128, for a tenth more space; what is only looked up takes no time.
FINE_BLOCK = 32
FINE = (Rule(at_most=SMALL, block=FINE_BLOCK), Rule(roles=("per_layer_embed",), block=FINE_BLOCK))
# Every bit more quarters the error, so small models have 6 bits everywhere: embeddings and head too, which are
# large next to the rest there. In large matrices every byte costs time, so half of the layers get more for one.
SMALL_WIDTH = 1024
WIDE = (
    Rule(roles=("down",), layers=SENSITIVE, bits=8),
    Rule(roles=("qkv", "out", "gate_up", "down"), at_most=SMALL, bits=6, block=64),
    Rule(roles=("embed", "head"), at_most_inputs=SMALL_WIDTH, bits=6),
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a model is calibrated: on ``tokens`` tokens, in rows of ``length``.

    ``tokens`` None is 24,576, and 16,384 for models above one billion parameters, whose layers are large.
    ``damping``: see ``quant.gptq.feedback``. ``sweeps``: see ``quant.gptq.gptq``. ``correct`` lets each matrix
    compensate for the errors of earlier layers too. ``seed`` is that of the text that the model writes itself.
    """

    tokens: int | None = None
    length: int = 128
    damping: float = 0.2
    sweeps: int = 1
    correct: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 16 or (self.tokens is not None and self.tokens < self.length):
            raise BadOption(
                f"calibration takes at least one row of at least 16 tokens; got {self.tokens} tokens in rows "
                f"of {self.length}."
            )
        if not 0 < self.damping <= 1:
            raise BadOption(f"damping must be above 0 and at most 1; got {self.damping}.")
        if not 0 <= self.sweeps <= 100:
            raise BadOption(f"sweeps must be 0 to 100; got {self.sweeps}.")

    def of(self, parameters: int, context: int) -> tuple[int, int]:
        """Return how many rows of which length a model reads that has so many parameters, and such a context."""
        tokens = self.tokens or (24576 if parameters < 1e9 else 16384)
        length = min(self.length, context)
        return max(1, tokens // length), length


@dataclass(frozen=True, slots=True)
class Preset:
    """A recipe as data. None leaves a choice to the target.

    ``algorithm`` finds the codes of all matrices but embeddings, and heads of 8 bits, which are rounded. ``wide``
    gives the matrices of ``WIDE`` more bits where the target has bits left over. ``rules`` come after that.
    ``rotate`` rotates the residual stream so that no channel stands out.
    """

    name: str
    algorithm: str
    bits: int | None = None
    block: int | None = None
    symmetric: bool | None = None
    head_bits: int | None = None
    embed_bits: int | None = None
    vision_bits: int | None = None
    wide: bool = False
    rotate: bool = False
    rules: tuple[Rule, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)


FAST = Preset("fast", "rtn", block=FINE_BLOCK)
BALANCED = Preset("balanced", "gptq", wide=True)
QUALITY = Preset(
    "quality",
    "gptq",
    rules=(Rule(roles=("gate_up",), at_most=SMALL, bits=6), Rule(roles=("qkv", "out", "down"), bits=8)),
    calibration=Calibration(tokens=65536),
)
PRESETS = {p.name: p for p in (FAST, BALANCED, QUALITY)}
