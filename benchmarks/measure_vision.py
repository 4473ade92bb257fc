"""Measure a vision tower of real size: time of pictures with and without padding crops, error of 8 and 4 bits.

    python benchmarks/measure_vision.py Phi-3.5-vision/config.json --runs 5

The weights are random, of the shapes that the published configuration implies; only what turns pictures into
features is built. Time is of the graph alone, median of several runs that take turns; with padding, as the
official runtime feeds it, each picture has 17 views, and the graph is the same but for leaving none out.
Errors are of the features, relative to those of the same weights in fp32.
"""

from __future__ import annotations

import argparse
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
from ortlm.cores import physical_cores
from ortlm.graph.vision import emit_vision
from ortlm.quant.recipe import Uniform
from ortlm.quant.scheme import Scheme
from ortlm.runtime.session import Session
from ortlm.spec import Architecture
from ortlm.target import HERE
from ortlm.write import lay_out, write_weights

# Height and width in views: a picture of 4:3 and one of 16:9 at 16 crops, a square one at 4.
PICTURES = {
    "16 crops, square": (4, 4),
    "16 crops, 4:3": (3, 4),
    "4 crops, square": (2, 2),
    "4 crops, 4:1": (1, 4),
}
MOST_VIEWS = 17


class Silent:
    """Progress that nobody watches."""

    def start(self, **_: int) -> None:
        """Do nothing."""

    advance = stage = step = start


class Random:
    """Rows of a weight that does not exist, always the same ones."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._seed, self._shape = sum(name.encode()), shape
        self.count = shape[0]
        self._norm = "norm" in name and name.endswith("weight")

    def rows(self, start: int, stop: int) -> Any:
        """Return rows [start, stop), float32."""
        shape = (self.count, *self._shape[1:])
        values = np.random.default_rng(self._seed).standard_normal(shape, np.float32)
        scale = 0.02 if len(shape) == 1 else shape[1] ** -0.5
        return values[start:stop] * np.float32(scale) + np.float32(self._norm)

    def columns(self, start: int, stop: int) -> Any:
        """Return columns [start, stop), transposed."""
        return np.ascontiguousarray(self.rows(0, self.count)[:, start:stop].T)


def build(arch: Architecture, folder: Path, bits: int) -> Path:
    """Write the graph with weights of so many bits, 0 for fp32, and return its path."""
    assert arch.vision is not None
    block, level = HERE.block, HERE.accuracy_level
    scheme = Scheme(bits=bits, block=block, symmetric=False, accuracy_level=level) if bits else None
    emitted = emit_vision(
        arch.vision,
        hidden=arch.decoder.hidden,
        target=HERE,
        dtype="fp32",
        recipe=Uniform(None, None, None, scheme),
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
    path = folder / f"{bits}.onnx"
    threads = physical_cores() or 1
    write_weights(folder / f"{bits}.data", g.plan, layout, stacks, threads=threads, progress=Silent())
    ir.save(g.model({n: (f"{bits}.data", at) for n, at in layout.offsets.items()}, "benchmark"), path)
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
    side = arch.vision.tower.side
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        sizes, sessions = {}, {}
        for bits in (0, 8, 4):
            path = build(arch, Path(name), bits)
            sizes[bits] = path.with_suffix(".data").stat().st_size
            sessions[bits] = Session(path)
        for label, (high, wide) in PICTURES.items():
            size, own = (high * side, wide * side), 1 + high * wide
            # What a tower sees: smooth, with colours of unit variance.
            coarse = random.standard_normal((own, 3, 12, 12), np.float32)
            pixels = np.repeat(np.repeat(coarse, side // 12, axis=2), side // 12, axis=3)
            full = np.concatenate([pixels, np.zeros((MOST_VIEWS - own, *pixels.shape[1:]), np.float32)])
            # The same graph, told that there are 16 crops: none is left out.
            everything = (4 * side, 4 * side)
            base = features(sessions[0], pixels[None], size)[0]
            errors = {
                bits: float(np.linalg.norm(features(sessions[bits], pixels[None], size)[0] - base))
                / float(np.linalg.norm(base))
                for bits in (8, 4)
            }
            times: dict[str, list[float]] = {}
            for _ in range(args.runs):
                for bits in (8, 4):
                    times.setdefault(f"int{bits}", []).append(features(sessions[bits], pixels[None], size)[1])
                    padded = features(sessions[bits], full[None], everything)[1]
                    times.setdefault(f"int{bits} padded", []).append(padded)
            row = {key: statistics.median(values) for key, values in times.items()}
            found[label] = {"seconds": row, "feature_error": errors, "views": own}
            print(
                f"{label:<18}{own:>3} views  int8 {row['int8']:.2f} s, padded {row['int8 padded']:.2f} s "
                f"({row['int8 padded'] / row['int8']:.2f} times); int4 {row['int4']:.2f} s; "
                f"feature error int8 {errors[8]:.5f}, int4 {errors[4]:.5f}",
                flush=True,
            )
    found["bytes"] = sizes
    print("MB:", {bits: round(size / 1e6) for bits, size in sizes.items()})
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
