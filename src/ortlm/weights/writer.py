"""Streams weights to disk: every core quantizes its own rows and writes them where they belong.

Memory is bounded by a few rows per core, whatever the size of a tensor or of the model.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ortlm._utils.progress import Progress
from ortlm.checkpoint.quantized_weight import Grid
from ortlm.checkpoint.stack import Interleaved, Stack
from ortlm.dtypes import Array, dtype
from ortlm.errors import BadCheckpoint, BadOption
from ortlm.graph.weight_plan import Columns, Item, Plain, Plan, Quantized
from ortlm.quant.algorithms import KEPT, quantizer
from ortlm.quant.pack import pack
from ortlm.quant.per_channel import round_columns
from ortlm.quant.rtn import Packed
from ortlm.weights.reader import RowReader

# Large tensors start on a page, so that they can be mapped on their own; small ones on a cache line.
_PAGE, _LINE, _LARGE = 4096, 64, 1 << 20
# Elements that one core handles at once: small enough for its cache, large enough to hide Python.
_CHUNK = 1 << 19


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor lies in the data file (name to byte offset) and how long the file is."""

    offsets: Mapping[str, int]
    bytes: int


def lay_out(plan: Plan) -> Layout:
    """Give every tensor of ``plan`` its place, in the order of computation; views share their bytes."""
    offsets, end = {}, 0
    for item in plan.items:
        for tensor in item.tensors:
            align = _PAGE if tensor.bytes >= _LARGE else _LINE
            end = -(-end // align) * align
            offsets[tensor.name] = end
            end += tensor.bytes
        if isinstance(item, Quantized):
            for view in item.views[1:]:
                offsets[view.name] = offsets[item.views[0].name]
    return Layout(offsets, end)


@dataclass(frozen=True, slots=True)
class _Task:
    """A piece of work for one core: call it, and ``bytes`` of the output are done."""

    run: Callable[[], None]
    bytes: int


def write_weights(
    path: Path,
    plan: Plan,
    layout: Layout,
    stacks: Mapping[str, RowReader],
    *,
    threads: int,
    progress: Progress,
) -> None:
    """Write the data file ``path``.

    ``stacks`` has the weights of each item by its first tensor's name. Raises what reading or quantizing
    raises; ``OSError`` with ENOSPC if the disk is full.
    """
    progress.start("writing", plan.bytes, "bytes")
    with path.open("wb") as stream:
        file = stream.fileno()
        if layout.bytes:
            # Reserve all of it now: a full disk shows before any work is done.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, layout.bytes)
            else:
                stream.truncate(layout.bytes)
        tasks = (
            task for item in plan.items for task in _tasks(path, item, layout, stacks[item.tensors[0].name])
        )
        stop = threading.Event()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="ortlm-write")
        pending: dict[Future[None], _Task] = {}

        def settle(done: Sequence[Future[None]]) -> None:
            for future in done:
                task = pending.pop(future)
                future.result()
                progress.advance(task.bytes)

        try:
            for task in tasks:
                while len(pending) >= 2 * threads:
                    settle(list(wait(pending, return_when=FIRST_COMPLETED).done))
                pending[pool.submit(_unless(stop, task.run))] = task
            while pending:
                settle(list(wait(pending, return_when=FIRST_COMPLETED).done))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        stream.flush()
        os.fsync(file)


def _unless(stop: threading.Event, run: Callable[[], None]) -> Callable[[], None]:
    def guarded() -> None:
        if not stop.is_set():
            run()

    return guarded


def _tasks(path: Path, item: Item, layout: Layout, weights: RowReader) -> list[_Task]:
    if isinstance(item, Quantized | Columns):
        rows, width = item.rows, item.inputs
    else:
        rows = weights.count
        width = math.prod(item.tensor.shape) // rows
    size = sum(t.bytes for t in item.tensors)
    return [
        _Task(
            functools.partial(_write_rows, path, item, layout, weights, a, b),
            # Shares that add up to the whole, whatever is lost in rounding.
            size * b // rows - size * a // rows,
        )
        for a, b in _ranges(rows, width)
    ]


def _ranges(rows: int, width: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // max(width, 1))
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


def _write_rows(path: Path, item: Item, layout: Layout, weights: RowReader, a: int, b: int) -> None:
    if isinstance(item, Quantized):
        _write_quantized(path, item, layout, weights, a, b)
    elif isinstance(item, Columns):
        _write_columns(path, item, layout, weights, a, b)
    else:
        _write_plain(path, item, layout, weights, a, b)


def _write_quantized(path: Path, item: Quantized, layout: Layout, weights: RowReader, a: int, b: int) -> None:
    if item.scheme.algorithm == KEPT:
        write_packed(path, item, layout, _kept(item, weights, a, b), a)
        return
    with np.errstate(over="ignore", invalid="ignore"):
        packed = quantizer(item.scheme.algorithm)(weights.rows(a, b), item.scheme)
    write_packed(path, item, layout, packed, a)


def _kept(item: Quantized, weights: RowReader, a: int, b: int) -> Packed:
    """Return rows [a, b) of ``item`` as the checkpoint has them."""
    assert isinstance(weights, Stack | Interleaved)
    scheme = item.scheme
    codes, scales, zeros = weights.codes(a, b, Grid(scheme.bits, scheme.block, scheme.symmetric))
    short = scheme.blocks(item.inputs) * scheme.block - item.inputs
    if short:
        codes = np.pad(codes, ((0, 0), (0, short)), constant_values=scheme.zero)
    return Packed(
        pack(codes, scheme.bits), scales, None if zeros is None else pack(zeros, scheme.kernel_bits)
    )


def write_packed(path: Path, item: Quantized, layout: Layout, packed: Packed, start: int) -> None:
    """Write rows of the matrix ``item``, from row ``start`` on, where they belong in the file ``path``.

    Raises BadCheckpoint if a scale is not finite.
    """
    if not np.isfinite(packed.scales).all():
        raise BadCheckpoint(
            f"weight {' + '.join(item.parameters)} has values near the largest that fp32 holds, which cannot be "
            "scaled: the checkpoint is damaged or training diverged."
        )
    scales = _narrow(packed.scales, item.scales.dtype, item.scales.name)
    parts = [(item.views[0], packed.values), (item.scales, scales)]
    if item.zeros is not None and packed.zeros is not None:
        parts.append((item.zeros, packed.zeros))
    for tensor, data in parts:
        row = tensor.bytes // item.rows
        _write_at(path, data, layout.offsets[tensor.name] + start * row)


def _write_columns(path: Path, item: Columns, layout: Layout, weights: RowReader, a: int, b: int) -> None:
    codes, scales = round_columns(weights.rows(a, b))
    if not np.isfinite(scales).all():
        raise BadCheckpoint(
            f"weight {' + '.join(item.parameters)} has values near the largest that fp32 holds, which cannot be "
            "scaled: the checkpoint is damaged or training diverged."
        )
    _write_across(path, codes, layout.offsets[item.codes.name], item.rows, a)
    _write_at(path, scales, layout.offsets[item.scales.name] + 4 * a)


def write_values(path: Path, item: Plain, layout: Layout, values: Array) -> None:
    """Write a float tensor, [out, in] or a vector, where it belongs in the file ``path``."""
    data = values.T if item.transposed else values
    _write_at(path, _narrow(data, item.tensor.dtype, item.tensor.name), layout.offsets[item.tensor.name])


def _write_plain(path: Path, item: Plain, layout: Layout, weights: RowReader, a: int, b: int) -> None:
    data, place = (
        _narrow(weights.rows(a, b), item.tensor.dtype, item.tensor.name),
        layout.offsets[item.tensor.name],
    )
    if item.transposed:
        _write_across(path, data, place, item.tensor.shape[1], a)
    else:
        _write_at(path, data, place + a * (item.tensor.bytes // weights.count))


def _narrow(data: Array, kind: str, name: str) -> Array:
    if kind == "fp32":
        return data
    with np.errstate(over="ignore"):
        small = data.astype(dtype(kind).numpy)
    if kind == "fp16" and not np.isfinite(small).all():
        worst = float(np.abs(data).max())
        raise BadOption(
            f"weight {name!r} has a value of {worst:.3g}, beyond fp16's largest, 65504. "
            "Nearest: -p bf16 -e cuda, or -p fp32 -e cpu."
        )
    return small


def _write_at(path: Path, data: Array, offset: int) -> None:
    view = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
    # A handle of its own: several threads write at once, and not every system has pwrite.
    with path.open("r+b", buffering=0) as stream:
        stream.seek(offset)
        while view:
            view = view[stream.write(view) :]


def _write_across(path: Path, data: Array, offset: int, rows: int, start: int) -> None:
    """Write rows of a matrix as columns, from column ``start`` of ``rows`` on.

    The matrix, transposed, begins at ``offset`` of the file.
    """
    # They lie across the rows of the file: mapped, one statement writes them all. The file is ours and has all
    # its blocks, so that nothing can be missing under the mapping.
    plain = data.view(f"u{data.itemsize}")  # which numpy copies fast, bfloat16 too
    mapped = np.memmap(path, plain.dtype, "r+", offset, (plain.shape[1], rows))
    mapped[:, start : start + len(plain)] = plain.T
    del mapped
