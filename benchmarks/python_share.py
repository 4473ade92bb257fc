"""How long a step takes outside of ONNX Runtime, and how many of its sessions are made and run.

    python benchmarks/python_share.py DIR --batches 1,4,16 --steps 200 --runs 3

DIR is a folder for the CPU, best a small model with a vocabulary of usual size: with large ones nothing is left
to see. Everything runs twice: in main memory, and as a device would, with states that only graphs can reach; that
device is the processor, so what is measured there is the loop and not how fast a device is. Counted are sessions
that are made and their runs, until the first token and for each later step. Times are CPU times of the one thread:
the tenth of the steps that is fastest, in the best of the runs, because whatever else the machine does only adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 0},
}
PROMPT = 32


class Counter:
    """What ONNX Runtime did: seconds in runs, their number, and sessions made."""

    def __init__(self) -> None:
        self.seconds, self.runs, self.sessions = 0.0, 0, 0

    def watch(self) -> None:
        """Count from now on."""
        kind = onnxruntime.InferenceSession
        run, make = kind.run_with_iobinding, kind.__init__

        def timed(session: Any, *given: Any, **more: Any) -> None:
            began = time.thread_time()
            run(session, *given, **more)
            self.seconds += time.thread_time() - began
            self.runs += 1

        def made(session: Any, *given: Any, **more: Any) -> None:
            self.sessions += 1
            make(session, *given, **more)

        kind.run_with_iobinding, kind.__init__ = timed, made

    def since(self, before: tuple[float, int, int]) -> tuple[float, int, int]:
        """Return what was added to ``before``."""
        return tuple(new - old for new, old in zip(self.now(), before, strict=True))  # type: ignore[return-value]

    def now(self) -> tuple[float, int, int]:
        """Return seconds, runs and sessions."""
        return self.seconds, self.runs, self.sessions


@contextmanager
def like_a_device(used: bool) -> Iterator[None]:
    """Let models that are loaded here keep their states out of numpy's reach, if ``used``."""
    from ortlm.runtime import loading
    from ortlm.runtime.engine import session as engine
    from ortlm.runtime.engine.device_memory import DeviceMemory
    from ortlm.runtime.engine.devices import CPU

    place = ("cpu", 0)

    class DeviceSession(engine.Session):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            self._place = place
            self.memory = DeviceMemory(engine._Runner(place, CPU))

    usual = loading.Session
    try:
        if used:
            loading.Session = DeviceSession  # type: ignore[misc]
        yield
    finally:
        loading.Session = usual  # type: ignore[misc]


def measure(lm: Any, counter: Counter, batch: int, steps: int, options: dict[str, Any]) -> dict[str, float]:
    """Return what one generation costs: milliseconds outside of ONNX Runtime, runs and sessions."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, lm.vocab_size, PROMPT - i % 4).tolist() for i in range(batch)]
    before, began = counter.now(), time.thread_time()
    generator = lm.generator(max_new_tokens=steps + 2, ignore_eos=True, **options)
    generator.append(rows if batch > 1 else rows[0])
    generator.step()
    seconds, _, sessions = counter.since(before)
    first = time.thread_time() - began - seconds
    outside, runs = [], []
    for _ in range(steps):
        before, began = counter.now(), time.thread_time()
        generator.step()
        whole = time.thread_time() - began
        seconds, count, more = counter.since(before)
        outside.append(whole - seconds)
        runs.append(count)
        sessions += more
    return {
        "first_ms": 1e3 * first,
        "step_ms": 1e3 * statistics.quantiles(outside, n=10)[0],
        "runs": statistics.median(runs),
        "sessions": sessions,
    }


def main() -> int:
    """Measure every mode and batch, in main memory and as on a device, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    import ortlm

    counter = Counter()
    counter.watch()
    rows: list[dict[str, Any]] = []
    for where in ("main memory", "as a device"):
        before, began = counter.now(), time.thread_time()
        with like_a_device(where != "main memory"):
            lm = ortlm.load(args.folder, threads=1)
        loaded = time.thread_time() - began
        print(f"{where}: loaded in {1e3 * loaded:.0f} ms, {counter.since(before)[2]} sessions", flush=True)
        print("  mode     batch   step outside, ms   runs per step   first token outside, ms   new sessions")
        for mode, options in MODES.items():
            for batch in map(int, args.batches.split(",")):
                found = [measure(lm, counter, batch, args.steps, options) for _ in range(args.runs)]
                row = {key: min(run[key] for run in found) for key in ("step_ms", "first_ms", "runs")}
                row["sessions"] = found[0]["sessions"]
                rows.append({"where": where, "mode": mode, "batch": batch, **row})
                print(
                    f"  {mode:<8} {batch:>5} {row['step_ms']:>18.3f} {row['runs']:>15.0f} "
                    f"{row['first_ms']:>25.2f} {row['sessions']:>14.0f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
