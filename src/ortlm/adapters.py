"""LoRA adapters at build time: which weights they change, and the files that give them to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from ortlm.checkpoint.peft import CONFIG_FILE, WEIGHTS_FILE, Delta, read_lora
from ortlm.checkpoint.reader import Checkpoint
from ortlm.dtypes import Array, dtype
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel, nearest
from ortlm.graph.weight_plan import LowRank
from ortlm.spec import Architecture, Parameter, parameters, vision_parameters

# The roles of weights that a product reads; of embeddings, which are looked up, nothing low-rank is known.
_ROLES = ("qkv", "out", "gate_up", "down", "head")
# A flatbuffer, which the file is, counts its bytes in 31 bits.
_MOST_BYTES = 2**31 - 1_000_000


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was matched to a model: what it adds, by canonical weight name."""

    folder: Path
    deltas: Mapping[str, Delta]


def open_adapter(
    folder: str | Path, checkpoint: Checkpoint, architecture: Architecture, *, merging: bool = False
) -> Adapter:
    """Open the peft adapter in ``folder`` and match it to the weights of ``checkpoint``.

    Only when ``merging`` may it change what sees pictures: a runtime has no inputs for that. Raises
    BadCheckpoint if it is damaged or was made for another model, UnsupportedModel if it is more than a LoRA on
    the matrices of attention, feed-forward and head.
    """
    places = _places(architecture)
    seeing = _seeing_places(architecture)
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
                continue  # of no part of the model, such as a tower's layer whose output nothing reads
            if tensor in seeing:
                raise UnsupportedModel(
                    f"{file}: tensor {delta.a.name!r} changes {tensor!r}, which sees pictures, and cannot be "
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
        found = places[tensor]
        rows = sum(p.shape[0] for p in found)
        inputs = found[0].shape[1]
        if (delta.b.shape[0], delta.a.shape[1]) != (rows, inputs):
            raise BadCheckpoint(
                f"{file}: tensors {delta.b.name!r} {list(delta.b.shape)} and {delta.a.name!r} "
                f"{list(delta.a.shape)} change a weight [{delta.b.shape[0]}, {delta.a.shape[1]}], but the model's "
                f"{tensor!r} is [{rows}, {inputs}]. Usual cause: an adapter for another size of this family."
            )
        deltas |= {p.name: delta for p in found}
    return Adapter(Path(folder), deltas)


def _places(architecture: Architecture) -> dict[str, list[Parameter]]:
    """Return the weights that an adapter may change, by the tensor of the checkpoint that they lie in."""
    spec = architecture.decoder
    found: dict[str, list[Parameter]] = {}
    for parameter in parameters(spec):
        if parameter.role in _ROLES:
            found.setdefault(architecture.sources[parameter.name].tensor, []).append(parameter)
    if spec.tied_head:
        found[architecture.head_copy] = [Parameter("head.weight", (spec.vocab, spec.hidden), "head")]
    return found


def _other_names(
    places: Mapping[str, list[Parameter]], architecture: Architecture
) -> dict[str, list[Parameter]]:
    """Return ``places`` by the names that modules have where the checkpoint's tensors have another prefix.

    An adapter is named after the modules of the class that it was trained on, with a head or without.
    """
    found: dict[str, list[Parameter]] = {}
    for tensor, parameters_there in places.items():
        for pair in architecture.renamed:
            for old, new in (pair, pair[::-1]):
                other = new + tensor.removeprefix(old)
                if tensor.startswith(old) and other not in places:
                    found.setdefault(other, parameters_there)
    return found


def _seeing_places(architecture: Architecture) -> dict[str, list[Parameter]]:
    """Return the same for the matrices that see pictures."""
    if architecture.vision is None:
        return {}
    return {
        architecture.sources[p.name].tensor: [p]
        for p in vision_parameters(architecture.vision, architecture.decoder.hidden)
        if p.role == "vision" and not architecture.sources[p.name].transposed
    }


def adapter_shapes(adapter: Adapter, inputs: Sequence[LowRank]) -> dict[str, tuple[int, int]]:
    """Return the shape of each tensor that ``adapter`` gives to a graph with ``inputs``, by the input's name."""
    shapes = {}
    for pair in inputs:
        rank = sum(d.rank for d in _distinct(adapter, pair))
        if rank:
            shapes[pair.a] = (pair.parameters[0].shape[1], rank)
            shapes[pair.b] = (rank, sum(p.shape[0] for p in pair.parameters))
    return shapes


def adapter_arrays(
    adapter: Adapter, inputs: Sequence[LowRank], architecture: Architecture, kind: str
) -> dict[str, Array]:
    """Return what ``adapter`` gives to a graph with ``inputs``, in element type ``kind``, by the input's name.

    Where several weights are one matrix in the graph, their A lie side by side and their B are the blocks of one
    matrix that is zero elsewhere. Weights that share an A, because they are one in the checkpoint, share it here.
    """
    arrays: dict[str, Array] = {}
    shapes = adapter_shapes(adapter, inputs)
    for pair in inputs:
        if pair.a not in shapes:
            continue
        a = np.zeros(shapes[pair.a], np.float32)
        b = np.zeros(shapes[pair.b], np.float32)
        rank = 0
        for delta in _distinct(adapter, pair):
            block = slice(rank, rank + delta.rank)
            a[:, block] = delta.down().T
            column = 0
            for parameter in pair.parameters:
                height = parameter.shape[0]
                if adapter.deltas.get(parameter.name) == delta:
                    source = architecture.sources.get(parameter.name)
                    rows = source.rows if source is not None and source.rows else (0, height)
                    b[block, column : column + height] = delta.up(*rows).T
                column += height
            rank = block.stop
        arrays |= {pair.a: _narrow(a, kind, pair.a, adapter), pair.b: _narrow(b, kind, pair.b, adapter)}
    return arrays


def adapter_bytes(adapter: Adapter, inputs: Sequence[LowRank], kind: str) -> int:
    """Return about how many bytes the file of ``adapter`` takes.

    Raises BadOption for one that gives nothing to a graph with ``inputs``, or that no file can hold.
    """
    shapes = adapter_shapes(adapter, inputs)
    if not shapes:
        raise BadOption(
            f"the adapter in {adapter.folder} changes none of the layers that are built. Build more of them, or "
            "leave the adapter out."
        )
    # Name, dimensions and offsets of a tensor take about as much as this.
    size = sum(rows * columns * dtype(kind).bytes + 150 for rows, columns in shapes.values())
    if size > _MOST_BYTES:
        raise BadOption(
            f"the adapter in {adapter.folder} takes {size:,} bytes, but ONNX Runtime's format ends at "
            f"{_MOST_BYTES:,}. Merge it into the weights instead: --merge-adapter."
        )
    return size


def write_adapter(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write ``arrays``, by the name of the graph's input, as ONNX Runtime's adapter file ``path``."""
    # Its own writer, so that the file is right; the rest of a build does without ONNX Runtime.
    import onnxruntime

    values = {}
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        kind = next(d for d in (dtype(n) for n in ("fp32", "fp16", "bf16")) if d.numpy == array.dtype)
        raw = array.view(np.uint16) if kind.name == "bf16" else array
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, kind.onnx)
    path.parent.mkdir(exist_ok=True)
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(str(path))


def _distinct(adapter: Adapter, pair: LowRank) -> list[Delta]:
    found = (adapter.deltas.get(p.name) for p in pair.parameters)
    return list(dict.fromkeys(d for d in found if d is not None))


def _narrow(data: Array, kind: str, name: str, adapter: Adapter) -> Array:
    with np.errstate(over="ignore"):
        small = data.astype(dtype(kind).numpy)
    if not np.isfinite(small.astype(np.float32)).all():
        raise BadCheckpoint(
            f"{adapter.folder}: {name} has a value of {float(np.abs(data).max()):.3g}, beyond the "
            f"largest of {kind}. Nearest: -p bf16 -e cuda, or -p fp32 -e cpu."
        )
    return small
