"""What is fast at prefill on a processor: the CPU provider, OpenVINO's plugin in f32 and bf16, --fast-prompts.

    python benchmarks/compare_openvino.py DIR --fast FAST_DIR --prompt 512 --new 32 --runs 5

DIR is a folder that ortlm built for the CPU, FAST_DIR the same model built with ``--fast-prompts``, which runs on
the CPU provider; without it only the others are compared. Needs ``ortlm[openvino]``. Every measurement has a
process of its own, and they take turns, each run beginning with another: ratios are taken within a run, so that a
machine that is slower for a while does not decide. Measured are the load, three prefills of a prompt (the plugin
compiles for a new shape in the first), decode after the third, and how far the logits are from the CPU provider's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def _hint(precision: str) -> dict[str, str]:
    return {"load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": precision}})}


CONTENDERS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "openvino, f32": {"device": "openvino", "device_options": _hint("f32")},
    "openvino, bf16": {"device": "openvino", "device_options": _hint("bf16")},
}
_FAST = "cpu, --fast-prompts"
RATES = ("prefill_1", "prefill_2", "prefill_3", "decode")


def measure(folder: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of the load, tokens per second, and the prompt's last logits."""
    import ortlm

    began = time.perf_counter()
    lm = ortlm.load(folder, threads=args.threads, **CONTENDERS.get(name, CONTENDERS["cpu"]))
    found: dict[str, Any] = {"load": time.perf_counter() - began}
    for number in (1, 2, 3):
        ids = np.random.default_rng(number).integers(0, lm.vocab_size, args.prompt).tolist()
        loop = lm.loop()
        loop.start()
        began = time.perf_counter()
        logits = loop.append([ids])
        found[f"prefill_{number}"] = args.prompt / (time.perf_counter() - began)
        token = logits.argmax(axis=1)
        found["logits"] = logits[0].tolist()
    began = time.perf_counter()
    for _ in range(args.new):
        token = loop.step(token).argmax(axis=1)
    found["decode"] = args.new / (time.perf_counter() - began)
    return found


def main() -> int:
    """Measure all in turn and print medians, and ratios to the CPU provider within each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fast", type=Path, help="folder built with --fast-prompts")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="by default the physical cores")
    parser.add_argument("--measure", choices=[*CONTENDERS, _FAST], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all runs there")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(str(args.folder), args.measure, args)))
        return 0
    names = [*CONTENDERS, *([_FAST] if args.fast else [])]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.runs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            command = [sys.executable, __file__, str(args.fast if name == _FAST else args.folder)]
            command += ["--measure", name, "--prompt", str(args.prompt), "--new", str(args.new)]
            command += ["--threads", str(args.threads)] if args.threads else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{name} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        base = runs["cpu"][-1]
        for name in names:
            last = runs[name][-1]
            last["error"] = _error(last.pop("logits") if name != "cpu" else base["logits"], base["logits"])
            last["ratios"] = {key: last[key] / base[key] for key in RATES}
        del base["logits"]
        print(f"run {turn + 1} of {args.runs}", file=sys.stderr, flush=True)
    print(f"{args.folder.name}: prefill of {args.prompt}, {args.new} decoded, medians of {args.runs}")
    print(f"{'':<20} load, s " + "".join(f"{key:>20}" for key in RATES) + "   logits' error")
    for name, found in runs.items():
        line = f"{name:<20} {statistics.median(run['load'] for run in found):>7.2f} "
        for key in RATES:
            rate = statistics.median(run[key] for run in found)
            ratio = statistics.median(run["ratios"][key] for run in found)
            line += f"{rate:>12.1f} ({ratio:.2f}x)"
        print(line + f"{statistics.median(run['error'] for run in found):>15.1e}")
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return 0


def _error(found: list[float], wanted: list[float]) -> float:
    """Return the relative error of logits, by their lengths as vectors."""
    right = np.array(wanted)
    return float(np.linalg.norm(np.array(found) - right) / np.linalg.norm(right))


if __name__ == "__main__":
    sys.exit(main())
