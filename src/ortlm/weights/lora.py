"""LoRA adapters matched to a model: which of its weights they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ortlm.checkpoint.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Change,
    Delta,
    Lora,
    Replacement,
    Shift,
    read_lora,
    scaled,
)
from ortlm.checkpoint.reader import Checkpoint
from ortlm.checkpoint.safetensors import Weight
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel, nearest
from ortlm.spec import Architecture, Parameter, Source, parameters
from ortlm.weights.resolution import untied

# The roles of weights that a product reads, so that a graph can add to what it gives.
_ROLES = ("qkv", "out", "gate_up", "down", "head")
_Places = dict[str, list[Parameter]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was matched to a model: what it adds, by canonical weight name."""

    folder: Path
    deltas: Mapping[str, Delta]


@dataclass(frozen=True, slots=True)
class MergedAdapters:
    """Adapters that become part of the weights: their folders and how much each counts, in their order.

    ``changes`` is what they do to a weight, one after the other, by its canonical name.
    """

    adapters: tuple[tuple[Path, float], ...]
    changes: Mapping[str, tuple[Change, ...]]

    def __str__(self) -> str:
        return ", ".join(
            folder.resolve().name + ("" if weight == 1 else f"={weight:g}")
            for folder, weight in self.adapters
        )


def open_adapter(folder: str | Path, checkpoint: Checkpoint, architecture: Architecture) -> Adapter:
    """Open the peft adapter in ``folder``, to be switched at run time, and match it to ``checkpoint``.

    Raises BadCheckpoint if it is damaged or was made for another model, UnsupportedModel if it is more than a
    LoRA on the matrices of attention, feed-forward and head.
    """
    places = _places(architecture)
    places |= _other_names(places, architecture)
    found = _read(folder, checkpoint, architecture)
    file = Path(folder) / WEIGHTS_FILE
    others = [
        (name, delta.a) for name, delta in found.deltas.items() if name not in places or not delta.plain
    ]
    others += [(name, weight) for name, weight in found.whole.items()]
    others += [(name, shift.values) for name, shift in found.shifts.items()]
    known = _everything(architecture)
    for name, tensor in others:
        if any(fnmatch(name, pattern) for pattern in architecture.ignored):
            continue  # of no part of the model, such as a vision encoder's layer whose output nothing reads
        if name not in known:
            raise _unknown(file, tensor, name, places)
        raise UnsupportedModel(
            f"{file}: tensor {tensor.name!r} changes {name!r} {_more_than_products(name, found)}, which cannot be "
            "switched at run time. Make it a part of the weights: --merge-adapter."
        )
    deltas: dict[str, Delta] = {}
    for name, delta in found.deltas.items():
        if name in places:
            _check_shape(file, name, delta, places[name])
            deltas |= {p.name: delta for p in places[name]}
    return Adapter(Path(folder), deltas)


def merge(
    adapters: Sequence[tuple[str | Path, float]], checkpoint: Checkpoint, architecture: Architecture
) -> tuple[Architecture, MergedAdapters | None]:
    """Match peft adapters, each with how much it counts, to ``checkpoint``; None if there are none.

    They may change every weight. A LoRA counts with its scale times that; what was trained whole takes the place
    of the model's own. Where only one of tied head and embeddings changes, they are one no longer, as in peft
    before it merges. Raises as ``open_adapter``, and BadOption for adapters that contradict each other.
    """
    if not adapters:
        return architecture, None
    known = _everything(architecture)
    changes: dict[str, tuple[Change, ...]] = {}
    replaced: dict[str, Path] = {}
    for folder, counts in adapters:
        file = Path(folder) / WEIGHTS_FILE
        found = _read(folder, checkpoint, architecture)
        if found.whole and counts != 1:
            raise BadOption(
                f"{folder} replaces whole weights ({next(iter(found.whole))}), which cannot count {counts:g} "
                "times. Merge it without a number."
            )
        for name, change in _changes(found, counts):
            if name not in known:
                if any(fnmatch(name, pattern) for pattern in architecture.ignored):
                    continue
                raise _unknown(file, _tensor(change), name, known)
            if isinstance(change, Replacement):
                if name in replaced:
                    raise BadOption(
                        f"{replaced[name]} and {folder} both replace {name}. Merge one of the two, or leave out "
                        "what they have in common."
                    )
                replaced[name] = Path(folder)
            _check_change(file, name, change, known[name], architecture, checkpoint)
            for parameter in known[name]:
                changes[parameter.name] = (*changes.get(parameter.name, ()), change)
    if architecture.decoder.tied_head and changes.keys() & {"head.weight", "embed.weight"}:
        architecture = untied(architecture, architecture.sources["embed.weight"])
    return architecture, MergedAdapters(tuple((Path(f), float(n)) for f, n in adapters), changes)


def _read(folder: str | Path, checkpoint: Checkpoint, architecture: Architecture) -> Lora:
    """Return what the adapter in ``folder`` does, by the names of the checkpoint's tensors or of modules."""
    base = dict(checkpoint.weights)
    for name, source in _tensors(architecture).items():
        if name not in base and source in base:
            base[name] = base[source]
    if architecture.decoder.tied_head:
        base.setdefault(architecture.head_copy, base[architecture.sources["embed.weight"].tensor])
    return read_lora(folder, base)


def _changes(found: Lora, counts: float) -> list[tuple[str, Change]]:
    """Return what an adapter does, what was trained whole first: a LoRA may lie on it."""
    changes: list[tuple[str, Change]] = [(name, Replacement(weight)) for name, weight in found.whole.items()]
    changes += [(name, scaled(delta, counts)) for name, delta in found.deltas.items()]
    changes += [(name, Shift(shift.values, shift.scale * counts)) for name, shift in found.shifts.items()]
    return changes


def _tensor(change: Change) -> Weight:
    if isinstance(change, Delta):
        return change.a
    return change.values if isinstance(change, Shift) else change.weight


def _check_change(
    file: Path,
    name: str,
    change: Change,
    held: Sequence[Parameter],
    architecture: Architecture,
    checkpoint: Checkpoint,
) -> None:
    """Raise BadCheckpoint or UnsupportedModel for a change that the weight at ``name`` cannot take."""
    source = architecture.sources.get(held[0].name, Source(name))
    apart = source.index is not None or source.step != 1 or bool(source.pieces)
    if apart or source.stored is not None or source.transposed:
        raise UnsupportedModel(
            f"{file}: tensor {_tensor(change).name!r} changes {name!r}, which is stored in a way that adapters "
            "are not matched to. Merge it with peft, and build the merged model."
        )
    if isinstance(change, Delta):
        if len(held[0].shape) != 2:
            raise UnsupportedModel(
                f"{file}: tensor {change.a.name!r} changes {name!r}, which is no matrix, so that no LoRA can."
            )
        _check_shape(file, name, change, held)
        return
    tensor = _tensor(change)
    base = checkpoint.weights.get(name) or checkpoint.weights[source.tensor]
    if tensor.shape != base.shape:
        raise BadCheckpoint(
            f"{file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, and the model's {name!r} "
            f"{list(base.shape)}. Usual causes: an adapter for another model, or a vocabulary that was resized "
            "for training; merge such an adapter with peft, and build the merged model."
        )


def _check_shape(file: Path, name: str, delta: Delta, held: Sequence[Parameter]) -> None:
    rows, inputs = sum(p.shape[0] for p in held), held[0].shape[1]
    if delta.shape != (rows, inputs):
        raise BadCheckpoint(
            f"{file}: tensors {delta.b.name!r} {list(delta.b.shape)} and {delta.a.name!r} {list(delta.a.shape)} "
            f"change a weight {list(delta.shape)}, but the model's {name!r} is [{rows}, {inputs}]. Usual cause: "
            "an adapter for another size of this family."
        )


def _unknown(file: Path, tensor: Weight, name: str, known: Mapping[str, object]) -> BadCheckpoint:
    return BadCheckpoint(
        f"{file}: tensor {tensor.name!r} changes {name!r}, which the model has not."
        + nearest(name, known)
        + f" Usual cause: an adapter for another model; {CONFIG_FILE} says which."
    )


def _more_than_products(name: str, found: Lora) -> str:
    """Return why a graph cannot add what an adapter does to ``name``."""
    delta = found.deltas.get(name)
    if delta is not None and delta.magnitude is not None:
        return "by DoRA"
    if delta is not None and delta.looked_up:
        return "by a LoRA on embeddings"
    return (
        "as a whole" if name in found.whole else "outside of the matrices of attention, feed-forward and head"
    )


def _everything(architecture: Architecture) -> _Places:
    """Return every weight by the tensor of the checkpoint that it lies in, and by the names that modules have."""
    places: _Places = {}
    for parameter in architecture.parameters:
        places.setdefault(architecture.sources[parameter.name].tensor, []).append(parameter)
    spec = architecture.decoder
    if spec.tied_head:
        places[architecture.head_copy] = [Parameter("head", "weight", (spec.vocab, spec.hidden), "head")]
    return places | _other_names(places, architecture)


def _tensors(architecture: Architecture) -> dict[str, str]:
    """Return the checkpoint's tensors by the other names that modules have."""
    return {
        name: architecture.sources[held[0].name].tensor
        for name, held in _everything(architecture).items()
        if held[0].name in architecture.sources
    }


def _places(architecture: Architecture) -> _Places:
    """Return the weights that an adapter may change, by the tensor of the checkpoint that they lie in."""
    spec = architecture.decoder
    parameters_of: dict[str, list[Parameter]] = {}
    # A tensor of which only some rows are such a matrix cannot be changed as a whole.
    others: set[str] = set()
    for parameter in parameters(spec):
        tensor = architecture.sources[parameter.name].tensor
        if parameter.role in _ROLES and not architecture.sources[parameter.name].pieces:
            parameters_of.setdefault(tensor, []).append(parameter)
        else:
            others.add(tensor)
    parameters_of = {tensor: held for tensor, held in parameters_of.items() if tensor not in others}
    if spec.tied_head:
        parameters_of[architecture.head_copy] = [
            Parameter("head", "weight", (spec.vocab, spec.hidden), "head")
        ]
    return parameters_of


def _other_names(places: Mapping[str, list[Parameter]], architecture: Architecture) -> _Places:
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
        # A matrix may lie in the checkpoint as peft keeps it in memory, next to adapters.
        plain = tensor.replace(".base_layer.", ".")
        if plain not in places:
            parameters_of.setdefault(plain, parameters_there)
    return parameters_of
