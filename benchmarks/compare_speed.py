"""Compare the speed of two model folders: in ortlm's runtime, and in onnxruntime-genai.

    python benchmarks/compare_speed.py ORTLM_DIR GENAI_DIR --prompt 512 --new 64 --runs 5

Measured are ORTLM_DIR in ortlm, the same folder in genai, and GENAI_DIR in genai, in turn, each time in a
process of its own and with the same number of threads: genai by itself takes half of the cores. The prompt is
random ids; both decode greedily, one token at a time, and neither stops early.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

_WARM_UP_STEPS = 4
_KEYS = ("load_seconds", "prefill_seconds", "prefill_per_second", "decode_per_second", "peak_mib")


def prompt_ids(vocab: int, length: int) -> list[int]:
    """Return ``length`` random token ids, the same on every call."""
    return [int(i) for i in np.random.default_rng(0).integers(0, vocab, length)]


def measure_ortlm(folder: str, length: int, new: int, threads: int) -> dict[str, float]:
    """Return the figures of one run in ortlm. ``peak_mib`` is resident memory with mapped files."""
    import ortlm

    began = time.perf_counter()
    lm = ortlm.load(folder, threads=threads)
    loaded = time.perf_counter() - began
    ids = prompt_ids(lm.vocab_size, length)
    warm = lm.loop()
    warm.start()
    logits = warm.append([ids[:16]])
    for _ in range(_WARM_UP_STEPS):
        logits = warm.step(logits.argmax(axis=1))
    del warm

    began = time.perf_counter()
    loop = lm.loop()
    loop.start()
    logits = loop.append([ids])
    token = logits.argmax(axis=1)
    middle = time.perf_counter()
    for _ in range(new):
        logits = loop.step(token)
        token = logits.argmax(axis=1)
    return _figures(loaded, middle - began, time.perf_counter() - middle, length, new)


def measure_genai(folder: str, length: int, new: int, threads: int) -> dict[str, float]:
    """Return the figures of one run in onnxruntime-genai. ``peak_mib`` as in ``measure_ortlm``."""
    import onnxruntime_genai as og

    vocab = json.loads((Path(folder) / "genai_config.json").read_text(encoding="utf-8"))["model"][
        "vocab_size"
    ]
    ids = np.array(prompt_ids(vocab, length), dtype=np.int32)
    began = time.perf_counter()
    config = og.Config(folder)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)
    loaded = time.perf_counter() - began

    def generator(prompt: int, steps: int) -> og.Generator:
        params = og.GeneratorParams(model)
        total = prompt + steps + 1
        # A minimum as high as the maximum bars stop tokens.
        params.set_search_options(do_sample=False, max_length=total, min_length=total)
        return og.Generator(model, params)

    warm = generator(16, _WARM_UP_STEPS)
    warm.append_tokens(ids[:16])
    for _ in range(1 + _WARM_UP_STEPS):
        warm.generate_next_token()
    del warm

    began = time.perf_counter()
    running = generator(length, new)
    running.append_tokens(ids)
    # The first call only picks from the prompt's logits; each further one runs the model first.
    running.generate_next_token()
    middle = time.perf_counter()
    for _ in range(new):
        running.generate_next_token()
    return _figures(loaded, middle - began, time.perf_counter() - middle, length, new)


def _figures(loaded: float, prefill: float, decode: float, length: int, new: int) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(zip(_KEYS, (loaded, prefill, length / prefill, new / decode, peak), strict=True))


_MEASURE = {"ortlm": measure_ortlm, "genai": measure_genai}


def in_subprocess(runtime: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Measure in a process of its own. Raises SystemExit if that fails."""
    command = [sys.executable, __file__, str(folder), "-", "--measure", runtime]
    command += ["--prompt", str(args.prompt), "--new", str(args.new), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{runtime} on {folder} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure all in turn, several times, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ortlm_dir", type=Path, help="folder that ortlm built")
    parser.add_argument("genai_dir", type=Path, help="folder that genai's builder built")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="for both; by default the physical cores")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--measure", choices=sorted(_MEASURE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads is None:
        from ortlm._utils.cpu import physical_cores

        args.threads = physical_cores() or os.cpu_count() or 1
    if args.measure:
        print(json.dumps(_MEASURE[args.measure](str(args.ortlm_dir), args.prompt, args.new, args.threads)))
        return 0

    contenders = {
        "ortlm": ("ortlm", args.ortlm_dir),
        "ortlm's folder in genai": ("genai", args.ortlm_dir),
        "genai": ("genai", args.genai_dir),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(args.runs):
        for name, (runtime, folder) in contenders.items():
            found = in_subprocess(runtime, folder, args)
            runs[name].append(found)
            print(
                f"run {number + 1} {name}: prefill {found['prefill_per_second']:.0f} tokens/s, "
                f"decode {found['decode_per_second']:.1f} tokens/s",
                flush=True,
            )

    medians = {
        name: {k: statistics.median(run[k] for run in found) for k in _KEYS} for name, found in runs.items()
    }
    base = medians["genai"]
    print(f"\nmedian of {args.runs}, prompt {args.prompt}, new {args.new}, threads {args.threads}")
    print(
        f"{'':<26}{'prefill t/s':>12}{'x genai':>9}{'decode t/s':>12}{'x genai':>9}{'load s':>8}{'peak MiB':>10}"
    )
    for name, m in medians.items():
        line = f"{name:<26}"
        for key in ("prefill_per_second", "decode_per_second"):
            line += f"{m[key]:>12.1f}{m[key] / base[key]:>9.2f}"
        print(f"{line}{m['load_seconds']:>8.2f}{m['peak_mib']:>10.0f}")
    if args.json:
        result = {
            "prompt": args.prompt,
            "new": args.new,
            "threads": args.threads,
            "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")},
            "medians": medians,
            "runs": runs,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
