"""Which weights of a checkpoint that is quantized already are carried over as they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ortlm.builder.options import BuildOptions
from ortlm.checkpoint.gguf_weights import WHOLE, BlockWeight
from ortlm.checkpoint.quantized_weight import QuantizedWeight, TransposedWeight
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadOption
from ortlm.graph.weight_plan import Plan, Quantized
from ortlm.quant.algorithms import KEPT
from ortlm.quant.recipe import Keeping, Recipe
from ortlm.quant.scheme import Scheme
from ortlm.spec import Architecture, Parameter
from ortlm.target import Target

# Models that were trained to be stored in a type say so in their names.
_TRAINED = re.compile(r"(^|[^a-z])qat([^a-z]|$)", re.IGNORECASE)
_TRAINED_TYPE = "Q4_0"
# Options that say how matrices are stored, which the checkpoint says then.
_SHAPING = (
    "bits", "block_size", "symmetric", "head_bits", "embed_bits", "expert_bits", "expert_block", "bits8_roles",
    "mixed", "excluded_nodes", "rules", "rotate",
)  # fmt: skip
_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """What holds the codes of a weight that is carried over, by its name in the spec."""

    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    def recipe(self, base: Recipe) -> Recipe:
        """Return ``base``, but for what is carried over."""
        return Keeping(base, self.schemes) if self.schemes else base


def kept_weights(
    checkpoint: Checkpoint,
    architecture: Architecture,
    *,
    target: Target,
    precision: str,
    options: BuildOptions,
    rotated: bool,
    changed: Iterable[str],
) -> KeptWeights:
    """Return the weights that ``options`` carry over, of those that are stored as ONNX Runtime has them too.

    With ``rotated`` no weight is as it was; ``changed`` are weights that an adapter changes. Unless the options
    say otherwise, those are carried over whose codes were trained or calibrated, and take no more bits than
    ``precision`` asks for. Raises BadOption where nothing can be, or other options contradict.
    """
    keep = options.keep_quantization
    set_ones = [name for name in _SHAPING if getattr(options, name) not in (None, (), False)]
    if rotated and "rotate" not in set_ones:
        set_ones.append("rotate")
    if keep and precision not in _BITS:
        raise BadOption(
            f"keep_quantization does not apply: -p {precision} quantizes nothing. Nearest: -p int4 or -p int8."
        )
    if keep and set_ones:
        raise BadOption(
            f"keep_quantization and {', '.join(set_ones)} contradict each other: the checkpoint says how its "
            "matrices are stored. Give one of the two."
        )
    if precision not in _BITS or set_ones or keep is False:
        return KeptWeights()
    trained = _is_trained(checkpoint)
    schemes = {}
    why = ""
    for parameter in architecture.parameters:
        weight = _stored(checkpoint, architecture, parameter)
        if weight is None or parameter.name in changed:
            continue
        if keep is None and not (weight.calibrated or trained):
            continue
        scheme, reason = _scheme(weight, target, precision, options)
        if scheme is None:
            why = reason
        elif keep or trained or scheme.bits <= _BITS[precision]:
            schemes[parameter.name] = scheme
    if keep and not schemes:
        held = types_of(checkpoint)
        raise BadOption(
            f"keep_quantization does not apply to {checkpoint.path.name}: "
            + (
                why
                or f"it holds {held or 'no quantized weights'}, and {_forms()} are what ONNX Runtime has the same "
                "form for"
            )
            + ". Leave it out."
        )
    return KeptWeights(schemes)


def _stored(
    checkpoint: Checkpoint, architecture: Architecture, parameter: Parameter
) -> QuantizedWeight | None:
    """Return the quantized matrix that ``parameter`` is, rows of one, or None."""
    source = architecture.sources[parameter.name]
    weight = checkpoint.weights[source.tensor]
    if len(parameter.shape) != 2 or source.stored is not None or not isinstance(weight, QuantizedWeight):
        return None
    if source.pieces:
        return None
    if source.index is not None:
        weight = weight.at(source.index)
    if source.transposed:
        return weight.inner if isinstance(weight, TransposedWeight) else None
    return weight if isinstance(weight, QuantizedWeight) else None


def _scheme(
    weight: QuantizedWeight, target: Target, precision: str, options: BuildOptions
) -> tuple[Scheme | None, str]:
    """Return what holds ``weight`` exactly on ``target``; None, and why, if nothing does."""
    grid = weight.grid()
    if grid is None:
        return None, ""
    bits = next(
        (bits for bits in sorted(target.weight_bits) if bits >= grid.bits and bits in (2, 4, 8)), None
    )
    if bits is None:
        return None, f"{target.name} has no kernel for {grid.bits}-bit weights"
    activations = target.precisions[precision]
    if activations != "fp32" and not (activations == "fp16" and grid.half):
        return None, f"scales in {activations} would not be the checkpoint's"
    level = target.accuracy_level if options.accuracy_level is None else options.accuracy_level
    scales = "fp16" if target.half_scales and grid.half else "fp32"
    return Scheme(bits, grid.block, grid.symmetric, level, KEPT, scales), ""


def _forms() -> str:
    return f"whole numbers of up to 8 bits in groups of inputs, and {', '.join(WHOLE)} of GGUF,"


def _is_trained(checkpoint: Checkpoint) -> bool:
    """Whether the model was trained to be stored in the type that its matrices have."""
    kinds = {w.kind for w in checkpoint.weights.values() if isinstance(w, BlockWeight) and len(w.shape) == 2}
    names = (*checkpoint.names, checkpoint.path.name)
    return _TRAINED_TYPE in kinds and any(_TRAINED.search(name) for name in names)


def types_of(checkpoint: Checkpoint) -> str:
    """Return the types of a checkpoint's quantized matrices, the most frequent first; empty for others."""
    counts: dict[str, int] = {}
    for weight in checkpoint.weights.values():
        if isinstance(weight, QuantizedWeight) and len(weight.shape) > 1:
            counts[weight.kind] = counts.get(weight.kind, 0) + math.prod(weight.shape)
    return ", ".join(sorted(counts, key=lambda kind: -counts[kind]))


def stored_before(checkpoint: Checkpoint, architecture: Architecture, plan: Plan) -> str:
    """Return what became of the types that a checkpoint's quantized matrices have, in words; empty for others."""
    kept = {
        name
        for item in plan.items
        if isinstance(item, Quantized) and item.scheme.algorithm == KEPT
        for name in item.parameters
    }
    total = 0
    sizes: dict[tuple[str, bool], int] = {}
    for parameter in architecture.parameters:
        if len(parameter.shape) != 2:
            continue
        total += parameter.size
        weight = checkpoint.weights[architecture.sources[parameter.name].tensor]
        if isinstance(weight, QuantizedWeight):
            key = weight.kind, parameter.name in kept
            sizes[key] = sizes.get(key, 0) + parameter.size
    return "; ".join(
        f"{kind} ({size / total:.0%} of matrices) {'carried over' if unchanged else 'dequantized'}"
        for (kind, unchanged), size in sorted(sizes.items(), key=lambda found: -found[1])
    )
