"""What this machine is and what it can do: memory bandwidth and the rate of int8 products, measured."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ortlm._utils.cpu import cpu_name, instruction_sets, physical_cores
from ortlm._version import __version__
from ortlm.dtypes import Array
from ortlm.runtime.engine.devices import available_providers, onnxruntime_version
from ortlm.runtime.engine.session import Session

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_CGROUP = Path("/sys/fs/cgroup")
_SMALLEST_BUFFER, _UNKNOWN_FREE = 1_000_000_000, 4_000_000_000
_PASSES = 5
_ROWS, _SIDE, _BLOCK = 512, 2048, 128


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second that reading a buffer gave, the best of several passes.

    ``cache_bytes`` is the size of the last cache, None if the system does not tell. A buffer that is not much
    larger measures that cache rather than memory.
    """

    bytes_per_second: float
    buffer_bytes: int
    cache_bytes: int | None


def environment() -> dict[str, Any]:
    """Return what a reader of figures has to know of machine and software."""
    return {
        "cpu": cpu_name(),
        "int8_instructions": instruction_sets(),
        "physical_cores": physical_cores() or None,
        "logical_processors": os.cpu_count(),
        "last_cache_bytes": last_cache_bytes(),
        "memory_bytes": _meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime_version(),
        "providers": available_providers(),
        "ortlm": __version__,
    }


def last_cache_bytes() -> int | None:
    """Return the size of the largest cache of the first processor, None if the system does not tell."""
    sizes = [_size("".join(_lines(path))) for path in _CPU.glob("index*/size")]
    return max(sizes, default=0) or None


def buffer_bytes(wanted: int | None = None) -> int:
    """Return how large a buffer measures memory and no cache: four times the last cache, 1 GB at least.

    Never more than a 4x smaller space that is free. ``wanted`` replaces the first part.
    """
    size = wanted or max(_SMALLEST_BUFFER, 4 * (last_cache_bytes() or 0))
    return max(1 << 20, min(size, _free_bytes() // 4))


def measure_bandwidth(threads: int, size: int) -> Bandwidth:
    """Return the rate at which so many threads read ``size`` bytes, each a part of its own."""
    # Written before it is read: pages that nobody wrote are all the same one.
    parts = np.array_split(np.ones(size // 8, dtype=np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(1 + _PASSES):
            began = time.perf_counter()
            # Of numpy's reductions the one that does least with what it reads.
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - began)
    return Bandwidth(size // 8 * 8 / best, size // 8 * 8, last_cache_bytes())


def measure_int8(threads: int) -> dict[str, float]:
    """Return operations per second by operator; an addition and a multiplication are two operations.

    Each multiplies 512 rows by 2048 x 2048 weights: MatMulInteger int8 ones, MatMulNBits those of 4 bits.
    """
    operations = 2 * _ROWS * _SIDE * _SIDE
    rates = {}
    with tempfile.TemporaryDirectory(prefix="ortlm-bench-") as folder:
        for operator, model in (("MatMulInteger", _integer_product()), ("MatMulNBits", _nbits_product())):
            path = Path(folder) / f"{operator}.onnx"
            ir.save(model, path)
            rates[operator] = operations / _fastest(path, threads)
    return rates


def measure_machine(threads: int, size: int) -> dict[str, Any]:
    """Return both measurements as JSON takes them; ``size`` is that of the buffer that is read."""
    return {"bandwidth": asdict(measure_bandwidth(threads, size)), "int8": measure_int8(threads)}


def _fastest(path: Path, threads: int) -> float:
    """Return the seconds of the fastest of several runs of a graph with the one input x."""
    session = Session(path, threads=threads)
    info = session.inputs["x"]
    rng = np.random.default_rng(0)
    binding = session.binding()
    binding.input("x", session.tensor(rng.integers(0, 127, (_ROWS, _SIDE)).astype(info.dtype.numpy)))
    binding.output("y", None)
    best = float("inf")
    for _ in range(2 + _PASSES):
        began = time.perf_counter()
        session.run(binding)
        best = min(best, time.perf_counter() - began)
    return best


def _integer_product() -> ir.Model:
    weights = np.random.default_rng(1).integers(-127, 128, (_SIDE, _SIDE), dtype=np.int8)
    x = _value("x", ir.DataType.UINT8)
    return _product(x, ir.Node("", "MatMulInteger", [x, _stored("w", weights)]), ir.DataType.INT32)


def _nbits_product() -> ir.Model:
    blocks = _SIDE // _BLOCK
    codes = np.random.default_rng(1).integers(0, 256, (_SIDE, blocks, _BLOCK // 2), dtype=np.uint8)
    scales = np.full((_SIDE, blocks), 0.01, dtype=np.float32)
    numbers = {"K": _SIDE, "N": _SIDE, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    x = _value("x", ir.DataType.FLOAT)
    inputs = [x, _stored("w", codes), _stored("scales", scales)]
    attributes = [ir.AttrInt64(key, number) for key, number in numbers.items()]
    node = ir.Node("com.microsoft", "MatMulNBits", inputs, attributes)
    return _product(x, node, ir.DataType.FLOAT)


def _value(name: str, kind: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape((_ROWS, _SIDE)), type=ir.TensorType(kind))


def _stored(name: str, array: Array) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(array, name=name))


def _product(x: ir.Value, node: ir.Node, result: ir.DataType) -> ir.Model:
    """Return a graph of the one ``node``, which multiplies x by what is stored and gives y."""
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", x.shape, ir.TensorType(result)
    stored = [value for value in node.inputs if value is not None and value is not x]
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=stored, opset_imports=opsets, name="product")
    return ir.Model(graph, ir_version=10)


def _free_bytes() -> int:
    """Return the memory that this process may still take: the system's, or what its cgroup grants."""
    free = [_meminfo("MemAvailable") or _UNKNOWN_FREE]
    limit, used = ("".join(_lines(_CGROUP / name)) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return max(0, min(free))


def _meminfo(key: str) -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _size(text: str) -> int:
    """Return the bytes that "480M" or "32K" says, 0 for anything else."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units and text[:-1].isdigit() else 0


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
