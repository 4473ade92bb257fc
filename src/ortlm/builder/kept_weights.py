"""Which weights of a checkpoint that is quantized already are carried over as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ortlm.builder.options import BuildOptions
from ortlm.checkpoint.gguf_weights import WHOLE, BlockWeight
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadOption
from ortlm.graph.weight_plan import Plan, Quantized
from ortlm.quant.algorithms import KEPT
from ortlm.quant.recipe import Keeping, Recipe
from ortlm.spec import Architecture
from ortlm.target import Target

# Models that were trained to be stored in a type say so in their names.
_TRAINED = re.compile(r"(^|[^a-z])qat([^a-z]|$)", re.IGNORECASE)
_TRAINED_TYPE = "Q4_0"
# Options that say how matrices are stored, which the checkpoint says then.
_SHAPING = (
    "bits", "block_size", "symmetric", "head_bits", "embed_bits", "bits8_roles", "mixed", "excluded_nodes",
    "rules", "rotate",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """How many bits the codes of a weight take that is carried over, by its name in the spec.

    ``accuracy_level`` and ``scales`` are those of ``Scheme``.
    """

    bits: Mapping[str, int] = field(default_factory=dict)
    accuracy_level: int = 0
    scales: str = "fp32"

    def recipe(self, base: Recipe) -> Recipe:
        """Return ``base``, but for what is carried over."""
        return Keeping(base, self.bits, self.accuracy_level, self.scales) if self.bits else base


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

    With ``rotated`` no weight is as it was; ``changed`` are weights that an adapter changes. Models that were
    trained for their type (QAT) are carried over unless the options say otherwise. Raises BadOption where nothing
    can be, or other options contradict.
    """
    keep = options.keep_quantization
    set_ones = [name for name in _SHAPING if getattr(options, name) not in (None, (), False)]
    if rotated and "rotate" not in set_ones:
        set_ones.append("rotate")
    quantized = precision in ("int4", "int8")
    if keep is None:
        keep = quantized and not set_ones and _is_trained(checkpoint)
    elif keep and not quantized:
        raise BadOption(
            f"keep_quantization does not apply: -p {precision} quantizes nothing. Nearest: -p int4 or -p int8."
        )
    elif keep and set_ones:
        raise BadOption(
            f"keep_quantization and {', '.join(set_ones)} contradict each other: the checkpoint says how its "
            "matrices are stored. Give one of the two."
        )
    if not keep:
        return KeptWeights()
    left_out = set(changed)
    found = {}
    for parameter in architecture.parameters:
        source = architecture.sources[parameter.name]
        weight = checkpoint.weights[source.tensor]
        bits = WHOLE.get(weight.kind) if isinstance(weight, BlockWeight) else None
        plain = len(parameter.shape) == 2 and not source.transposed and source.stored is None
        if bits and plain and parameter.name not in left_out and bits in target.weight_bits:
            found[parameter.name] = bits
    # Scales of 16 bits lose nothing in activations of fp16 or fp32.
    exact = target.precisions[precision] in ("fp16", "fp32")
    if not found or not exact:
        if options.keep_quantization is None:
            return KeptWeights()
        why = (
            f"scales in {target.precisions[precision]} would not be the checkpoint's"
            if found
            else f"it holds {types_of(checkpoint) or 'no quantized weights'}, and {', '.join(WHOLE)} are what "
            f"{target.name} has the same form for"
        )
        raise BadOption(f"keep_quantization does not apply to {checkpoint.path.name}: {why}. Leave it out.")
    level = target.accuracy_level if options.accuracy_level is None else options.accuracy_level
    return KeptWeights(found, level, "fp16" if target.half_scales else "fp32")


def _is_trained(checkpoint: Checkpoint) -> bool:
    """Whether the model was trained to be stored in the type that its matrices have."""
    kinds = {w.kind for w in checkpoint.weights.values() if isinstance(w, BlockWeight) and len(w.shape) == 2}
    names = (*checkpoint.names, checkpoint.path.name)
    return _TRAINED_TYPE in kinds and any(_TRAINED.search(name) for name in names)


def types_of(checkpoint: Checkpoint) -> str:
    """Return the types of a GGUF file's matrices, the most frequent first; empty for other checkpoints."""
    return ", ".join(_counted(checkpoint))


def _counted(checkpoint: Checkpoint) -> dict[str, int]:
    counts: dict[str, int] = {}
    for weight in checkpoint.weights.values():
        if isinstance(weight, BlockWeight) and len(weight.shape) == 2:
            counts[weight.kind] = counts.get(weight.kind, 0) + weight.shape[0] * weight.shape[1]
    return dict(sorted(counts.items(), key=lambda found: -found[1]))


def stored_before(checkpoint: Checkpoint, architecture: Architecture, plan: Plan) -> str:
    """Return what became of the types that a GGUF file's matrices have, in words; empty for other checkpoints."""
    kept = {
        name
        for item in plan.items
        if isinstance(item, Quantized) and item.scheme.algorithm == KEPT
        for name in item.parameters
    }
    sizes: dict[tuple[str, bool], int] = {}
    for parameter in architecture.parameters:
        weight: Any = checkpoint.weights[architecture.sources[parameter.name].tensor]
        if isinstance(weight, BlockWeight) and len(parameter.shape) == 2:
            key = weight.kind, parameter.name in kept
            sizes[key] = sizes.get(key, 0) + parameter.size
    total = sum(sizes.values())
    return "; ".join(
        f"{kind} ({size / total:.0%} of matrices) {'carried over' if unchanged else 'dequantized'}"
        for (kind, unchanged), size in sorted(sizes.items(), key=lambda found: -found[1])
    )
