"""Measure a vision encoder of real size: time of images with and without padding crops, error of 8 and 4 bits.

    python benchmarks/measure_vision.py Phi-3.5-vision/config.json --runs 5

The weights are random, of the shapes that the published configuration implies; only what turns images into
features is built. Time is of the graph alone, median of several runs that take turns; with padding, as the
official runtime feeds it, each image has 17 views, and the graph is the same but for leaving none out.
Errors are of the features, relative to those of the same weights in fp32.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ortlm import architectures
from ortlm._utils.cpu import physical_cores
from ortlm._utils.progress import NullProgress
from ortlm.graph.vision import emit_vision
from ortlm.quant.recipe import Uniform
from ortlm.quant.scheme import Scheme
from ortlm.runtime.engine.session import Session
from ortlm.spec import Architecture
from ortlm.target import HERE
from ortlm.weights.writer import lay_out, write_weights

# Height and width in views: what 16 crops make of an image of 4:3, and 4 of a square one.
IMAGES = {"16 crops, 4:3": (3, 4), "4 crops, square": (2, 2)}
# Bits of the weights, and whether products are of integers.
KINDS = {"int8": (8, False), "int4": (4, False), "int8, fast prompts": (8, True)}
MOST_VIEWS = 17


class Random:
    """Rows of a weight that does not exist, always the same ones."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._seed, self._shape = sum(name.encode()), shape
        self.count = shape[0]
        self._norm = "norm" in name and name.endswith("weight")

    @functools.cached_property
    def _values(self) -> Any:
        scale = 0.02 if len(self._shape) == 1 else self._shape[1] ** -0.5
        values = np.random.default_rng(self._seed).standard_normal(self._shape, np.float32)
        return values * np.float32(scale) + np.float32(self._norm)

    def rows(self, start: int, stop: int) -> Any:
        """Return rows [start, stop), float32."""
        return self._values[start:stop]

    def columns(self, start: int, stop: int) -> Any:
        """Return columns [start, stop), transposed."""
        return np.ascontiguousarray(self.rows(0, self.count)[:, start:stop].T)


def build(arch: Architecture, folder: Path, name: str, bits: int, fast: bool) -> Path:
    """Write the graph ``name`` with weights of so many bits, 0 for fp32, and return its path."""
    assert arch.vision is not None
    block, level = HERE.block, HERE.accuracy_level
    scheme = Scheme(bits=bits, block=block, symmetric=False, accuracy_level=level) if bits else None
    emitted = emit_vision(
        arch.vision,
        hidden=arch.decoder.hidden,
        target=HERE,
        dtype="fp32",
        recipe=Uniform(None, None, None, scheme),
        fast_prompts=fast,
    )
    g = emitted.builder
    layout = lay_out(g.plan)
    shapes: Mapping[str, tuple[int, ...]] = {p.name: p.shape for p in arch.parameters}

    def stacked(names: tuple[str, ...]) -> Any:
        parts = [Random(name, shapes[name]) for name in names]
        if len(parts) == 1:
            return parts[0]
        return Random(names[0], (sum(p.count for p in parts), *shapes[names[0]][1:]))

    stacks = {item.tensors[0].name: stacked(item.parameters) for item in g.plan.items}
    path = folder / f"{name}.onnx"
    threads = physical_cores() or 1
    write_weights(folder / f"{name}.data", g.plan, layout, stacks, threads=threads, progress=NullProgress())
    ir.save(g.model({n: (f"{name}.data", at) for n, at in layout.offsets.items()}, "benchmark"), path)
    return path


def features(session: Session, pixels: Any, size: tuple[int, int]) -> tuple[Any, float]:
    """Return the features, and how long they took in seconds."""
    binding = session.binding()
    binding.input("pixel_values", session.tensor(pixels))
    binding.input("image_sizes", session.tensor(np.array([size], np.int64)))
    binding.output("image_features", None)
    began = time.perf_counter()
    session.run(binding)
    return binding.result("image_features").numpy(), time.perf_counter() - began


def main() -> int:
    """Build, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    arch = architectures.describe(json.loads(args.config.read_text(encoding="utf-8")))
    assert arch.vision is not None
    side = arch.vision.encoder.side
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: build(arch, Path(folder), name, *kind) for name, kind in KINDS.items()}
        plain = Session(build(arch, Path(folder), "fp32", 0, False))
        sessions = {name: Session(path) for name, path in paths.items()}
        for label, (high, wide) in IMAGES.items():
            size, own = (high * side, wide * side), 1 + high * wide
            # What a vision encoder sees: smooth, with colors of unit variance.
            coarse = random.standard_normal((own, 3, 12, 12), np.float32)
            pixels = np.repeat(np.repeat(coarse, side // 12, axis=2), side // 12, axis=3)[None]
            fill = np.zeros((1, MOST_VIEWS - own, *pixels.shape[2:]), np.float32)
            full = np.concatenate([pixels, fill], axis=1)
            base = features(plain, pixels, size)[0]
            errors, times = {}, {}
            for name, session in sessions.items():
                error = features(session, pixels, size)[0] - base
                errors[name] = float(np.linalg.norm(error)) / float(np.linalg.norm(base))
            for _ in range(args.runs):
                for name, session in sessions.items():
                    times.setdefault(name, []).append(features(session, pixels, size)[1])
                # The same graph, told that there are 16 crops: none is left out.
                padded = features(sessions["int8"], full, (4 * side, 4 * side))[1]
                times.setdefault("int8, padded", []).append(padded)
            row = {name: statistics.median(values) for name, values in times.items()}
            found[label] = {"seconds": row, "feature_error": errors, "views": own}
            print(f"{label}: {own} views", flush=True)
            for name, seconds in row.items():
                error = f", feature error {errors[name]:.4f}" if name in errors else ""
                print(f"  {name:<20}{seconds:>7.2f} s{error}", flush=True)
        found["bytes"] = {name: path.with_suffix(".data").stat().st_size for name, path in paths.items()}
    print("MB:", {name: round(size / 1e6) for name, size in found["bytes"].items()})
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
