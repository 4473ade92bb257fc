"""LoRA adapters matched to a model: which of its weights they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ortlm.checkpoint.peft import CONFIG_FILE, WEIGHTS_FILE, Delta, read_lora
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadCheckpoint, UnsupportedModel, nearest
from ortlm.spec import Architecture, Parameter, parameters, vision_parameters

# The roles of weights that a product reads; of embeddings, which are looked up, nothing low-rank is known.
_ROLES = ("qkv", "out", "gate_up", "down", "head")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was matched to a model: what it adds, by canonical weight name."""

    folder: Path
    deltas: Mapping[str, Delta]


def open_adapter(
    folder: str | Path, checkpoint: Checkpoint, architecture: Architecture, *, merging: bool = False
) -> Adapter:
    """Open the peft adapter in ``folder`` and match it to the weights of ``checkpoint``.

    Only when ``merging`` may it change the vision encoder: a runtime has no inputs for that. Raises
    BadCheckpoint if it is damaged or was made for another model, UnsupportedModel if it is more than a LoRA on
    the matrices of attention, feed-forward and head.
    """
    places = _places(architecture)
    seeing = _vision_places(architecture)
    if merging:
        places |= seeing
    base = dict(checkpoint.weights)
    for tensors in (places, seeing):
        tensors |= _other_names(tensors, architecture)
    if architecture.decoder.tied_head:
        base.setdefault(architecture.head_copy, base[architecture.sources["embed.weight"].tensor])
    file = Path(folder) / WEIGHTS_FILE
    deltas: dict[str, Delta] = {}
    for tensor, delta in read_lora(folder, base).items():
        if tensor not in places:
            if any(fnmatch(tensor, pattern) for pattern in architecture.ignored):
                continue  # of no part of the model, such as a vision encoder's layer whose output nothing reads
            if tensor in seeing:
                raise UnsupportedModel(
                    f"{file}: tensor {delta.a.name!r} changes {tensor!r}, which sees images, and cannot be "
                    "switched at run time. Make it a part of the weights: --merge-adapter."
                )
            if tensor in {s.tensor for s in architecture.sources.values()}:
                raise UnsupportedModel(
                    f"{file}: tensor {delta.a.name!r} changes {tensor!r}, which is no matrix of attention, "
                    "feed-forward or head; adapters on others are not supported."
                )
            raise BadCheckpoint(
                f"{file}: tensor {delta.a.name!r} changes {tensor!r}, which the model has not."
                + nearest(tensor, places)
                + f" Usual cause: an adapter for another model; {CONFIG_FILE} says which."
            )
        held = places[tensor]
        rows = sum(p.shape[0] for p in held)
        inputs = held[0].shape[1]
        if (delta.b.shape[0], delta.a.shape[1]) != (rows, inputs):
            raise BadCheckpoint(
                f"{file}: tensors {delta.b.name!r} {list(delta.b.shape)} and {delta.a.name!r} "
                f"{list(delta.a.shape)} change a weight [{delta.b.shape[0]}, {delta.a.shape[1]}], but the model's "
                f"{tensor!r} is [{rows}, {inputs}]. Usual cause: an adapter for another size of this family."
            )
        deltas |= {p.name: delta for p in held}
    return Adapter(Path(folder), deltas)


def _places(architecture: Architecture) -> dict[str, list[Parameter]]:
    """Return the weights that an adapter may change, by the tensor of the checkpoint that they lie in."""
    spec = architecture.decoder
    parameters_of: dict[str, list[Parameter]] = {}
    for parameter in parameters(spec):
        if parameter.role in _ROLES:
            parameters_of.setdefault(architecture.sources[parameter.name].tensor, []).append(parameter)
    if spec.tied_head:
        parameters_of[architecture.head_copy] = [
            Parameter("head", "weight", (spec.vocab, spec.hidden), "head")
        ]
    return parameters_of


def _other_names(
    places: Mapping[str, list[Parameter]], architecture: Architecture
) -> dict[str, list[Parameter]]:
    """Return ``places`` by the names that modules have where the checkpoint's tensors have another prefix.

    An adapter is named after the modules of the class that it was trained on, with a head or without.
    """
    parameters_of: dict[str, list[Parameter]] = {}
    for tensor, parameters_there in places.items():
        for pair in architecture.renamed:
            for old, new in (pair, pair[::-1]):
                other = new + tensor.removeprefix(old)
                if tensor.startswith(old) and other not in places:
                    parameters_of.setdefault(other, parameters_there)
    return parameters_of


def _vision_places(architecture: Architecture) -> dict[str, list[Parameter]]:
    """Return the same for the matrices that see images."""
    if architecture.vision is None:
        return {}
    return {
        architecture.sources[p.name].tensor: [p]
        for p in vision_parameters(architecture.vision, architecture.decoder.hidden)
        if p.role == "vision" and not architecture.sources[p.name].transposed
    }
