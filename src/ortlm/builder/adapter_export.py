"""LoRA adapters at build time: which weights they change, and the files that give them to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ortlm.checkpoint.peft import Delta
from ortlm.dtypes import Array, dtype
from ortlm.errors import BadCheckpoint, BadOption
from ortlm.graph.weight_plan import LowRank
from ortlm.spec import Architecture
from ortlm.weights.lora import Adapter

# A flatbuffer, which the file is, counts its bytes in 31 bits.
_MOST_BYTES = 2**31 - 1_000_000


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
    deltas = (adapter.deltas.get(p.name) for p in pair.parameters)
    return list(dict.fromkeys(d for d in deltas if d is not None))


def _narrow(data: Array, kind: str, name: str, adapter: Adapter) -> Array:
    with np.errstate(over="ignore"):
        small = data.astype(dtype(kind).numpy)
    if not np.isfinite(small.astype(np.float32)).all():
        raise BadCheckpoint(
            f"{adapter.folder}: {name} has a value of {float(np.abs(data).max()):.3g}, beyond the "
            f"largest of {kind}. Nearest: -p bf16 -e cuda, or -p fp32 -e cpu."
        )
    return small
