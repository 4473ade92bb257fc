"""Where the CPU time of a calibrated build goes.

    python benchmarks/profile_build.py ./my-fine-tune [--layers N] [--calibration FILE]

Builds with the default recipe into a folder that is removed again, and prints CPU seconds (user and system, all
threads) and wall time of each stage. Stages do not overlap: what one calls counts for that one alone. On a busy
machine CPU seconds still compare.
"""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ortlm
from ortlm.builder import pipeline
from ortlm.builder.options import BuildOptions
from ortlm.calibration import dataset, integer_moments, layer_quantizer, progress_state, run
from ortlm.layerwise.model import LayerwiseModel
from ortlm.layerwise.paired_products import PairedProducts
from ortlm.runtime.engine.decode_loop import Loop

# What is timed: where it lies, its name, and the stage that it belongs to.
_STAGES: list[tuple[Any, str, str]] = [
    (pipeline, "_draft", "text: building the draft"),
    (dataset, "write_rows", "text: everything else"),
    (dataset, "_draw", "text: drawing tokens"),
    (Loop, "step", "text: decoding"),
    (Loop, "append", "text: decoding"),
    (pipeline, "_write_all", "rounding what is not calibrated"),
    (LayerwiseModel, "_execute", "forward passes: all but products by integers"),
    (PairedProducts, "__init__", "forward passes: products by integers"),
    (PairedProducts, "__call__", "forward passes: products by integers"),
    (LayerwiseModel, "_fed", "reading weights"),
    (LayerwiseModel, "embed", "embeddings"),
    (run, "moments", "second moments"),
    (integer_moments.IntegerMoments, "__call__", "second moments"),
    (layer_quantizer, "feedback", "factorization"),
    (layer_quantizer, "corrected", "correction"),
    (layer_quantizer.LayerQuantizer, "_ranges", "search for ranges"),
    (layer_quantizer, "gptq", "GPTQ"),
    (progress_state.CalibrationProgress, "finish", "keeping progress"),
    (pipeline, "_hashes", "hashes"),
]
_REST = "everything else"


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class Stages:
    """CPU seconds and wall time by stage."""

    def __init__(self) -> None:
        self.cpu: Counter[str] = Counter()
        self.wall: Counter[str] = Counter()
        self._open = [_REST]
        self._at = cpu_seconds(), time.monotonic()

    def count(self) -> None:
        """Count the time since the last call for the stage that is open."""
        cpu, wall = cpu_seconds(), time.monotonic()
        self.cpu[self._open[-1]] += cpu - self._at[0]  # type: ignore[assignment]
        self.wall[self._open[-1]] += wall - self._at[1]  # type: ignore[assignment]
        self._at = cpu, wall

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count for ``stage`` what ``owner``'s function ``name`` takes."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **keywords: Any) -> Any:
            self.count()
            self._open.append(stage)
            try:
                return inner(*args, **keywords)
            finally:
                self.count()
                self._open.pop()

        static = isinstance(owner, type) and isinstance(owner.__dict__[name], staticmethod)
        setattr(owner, name, staticmethod(timed) if static else timed)


def main() -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--calibration", help="file to calibrate on, in place of text that the model generates"
    )
    args = parser.parse_args()
    stages = Stages()
    for owner, name, stage in _STAGES:
        stages.watch(owner, name, stage)
    options = BuildOptions(recipe="balanced", layers=args.layers, calibration=args.calibration)
    with tempfile.TemporaryDirectory() as folder:
        ortlm.build(args.checkpoint, Path(folder) / "out", precision="int4", options=options)
    stages.count()
    total = sum(stages.cpu.values())
    print("| stage | CPU s | share | wall s |\n|---|---|---|---|")
    for stage, seconds in stages.cpu.most_common():
        print(f"| {stage} | {seconds:.1f} | {seconds / total:.0%} | {stages.wall[stage]:.1f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{total:.0f} CPU s, {sum(stages.wall.values()):.0f} s, at most {peak:.2f} GB of memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
