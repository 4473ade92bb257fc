"""What the generation loop costs: its own time per step, and decoding against a bare loop and against genai.

    python benchmarks/compare_loop.py DIR --prompt 64 --new 128 --runs 5

DIR is a folder that ortlm built. Three ways to decode greedily with it are measured in turn, each in a process of
its own with the same number of threads: ortlm's Generator, a loop of a few lines over ONNX Runtime with IO binding
and a cache that is updated in place, and onnxruntime-genai. The time of a step that is not ONNX Runtime's own is
printed for greedy decoding and for temperature, top-k and top-p together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 0}


def prompt_ids(vocab: int, length: int) -> list[int]:
    """Return ``length`` random token ids, the same on every call."""
    return [int(i) for i in np.random.default_rng(0).integers(0, vocab, length)]


def measure_ortlm(folder: str, length: int, new: int, threads: int) -> dict[str, float]:
    """Return milliseconds per greedy step, and what of it is not ONNX Runtime's, greedy and sampled."""
    import ortlm

    lm = ortlm.load(folder, threads=threads)
    spent = 0.0
    run = lm.session.run

    def timed(binding: Any, **options: Any) -> None:
        nonlocal spent
        began = time.perf_counter()
        run(binding, **options)
        spent += time.perf_counter() - began

    def decode(**options: Any) -> tuple[float, float]:
        nonlocal spent
        generator = lm.generator(max_new_tokens=new + 1, ignore_eos=True, **options)
        generator.append(prompt_ids(lm.vocab_size, length))
        generator.step()
        steps = []
        for _ in range(new):
            spent = 0.0
            began = time.perf_counter()
            generator.step()
            whole = time.perf_counter() - began
            steps.append((1e3 * whole, 1e3 * (whole - spent)))
        return statistics.median(s[0] for s in steps), statistics.median(s[1] for s in steps)

    decode()
    plain, _ = decode()
    lm.session.run = timed  # type: ignore[method-assign]
    _, greedy = decode()
    _, sampled = decode(**_SAMPLED)
    return {"step_ms": plain, "greedy_overhead_ms": greedy, "sampled_overhead_ms": sampled}


def measure_bare(folder: str, length: int, new: int, threads: int) -> dict[str, float]:
    """Return milliseconds per step of ONNX Runtime with IO binding and nothing around it."""
    import onnxruntime as ort

    from ortlm.artifact import open_artifact
    from ortlm.runtime.engine.huge_pages import use_huge_pages

    manifest = open_artifact(folder).manifest
    graph = manifest.graphs["decoder"]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_mem_pattern = False
    session = ort.InferenceSession(Path(folder) / graph.file, options, providers=["CPUExecutionProvider"])
    # The loader's work, not the loop's.
    use_huge_pages()
    binding = session.io_binding()
    shapes = {node.name: node.shape for node in session.get_inputs()}
    kept = []
    for state in graph.states:
        _, heads, _, width = shapes[state.past]
        buffer = ort.OrtValue.ortvalue_from_numpy(
            np.zeros((1, heads, length + new + 8, width), dtype=np.float32)
        )
        binding.bind_ortvalue_input(state.past, buffer)
        binding.bind_ortvalue_output(state.present, buffer)
        kept.append(buffer)
    vocab = session.get_outputs()[0].shape[2]
    logits = np.zeros((1, 1, vocab), dtype=np.float32)
    binding.bind_ortvalue_output(graph.outputs["logits"], ort.OrtValue.ortvalue_from_numpy(logits))

    def feed(ids: list[int], total: int) -> int:
        tokens = np.array([ids], dtype=np.int64)
        mask = np.ones((1, total), dtype=np.int64)
        binding.bind_ortvalue_input(graph.inputs["input_ids"], ort.OrtValue.ortvalue_from_numpy(tokens))
        binding.bind_ortvalue_input(graph.inputs["attention_mask"], ort.OrtValue.ortvalue_from_numpy(mask))
        session.run_with_iobinding(binding)
        return int(logits.argmax())

    steps: list[float] = []
    for _ in range(2):
        steps.clear()
        token = feed(prompt_ids(vocab, length), length)
        for at in range(new + 1):
            began = time.perf_counter()
            token = feed([token], length + at + 1)
            if at:
                steps.append(1e3 * (time.perf_counter() - began))
    return {"step_ms": statistics.median(steps)}


def measure_genai(folder: str, length: int, new: int, threads: int) -> dict[str, float]:
    """Return milliseconds per step in onnxruntime-genai."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    vocab = json.loads((Path(folder) / "genai_config.json").read_text(encoding="utf-8"))["model"][
        "vocab_size"
    ]
    steps: list[float] = []
    for _ in range(2):
        steps.clear()
        params = og.GeneratorParams(model)
        total = length + new + 2
        # A minimum as high as the maximum bars stop tokens.
        params.set_search_options(do_sample=False, max_length=total, min_length=total)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompt_ids(vocab, length), dtype=np.int32))
        generator.generate_next_token()
        for _ in range(new):
            began = time.perf_counter()
            generator.generate_next_token()
            steps.append(1e3 * (time.perf_counter() - began))
    return {"step_ms": statistics.median(steps)}


_MEASURE = {"ortlm": measure_ortlm, "bare": measure_bare, "genai": measure_genai}


def main() -> int:
    """Measure all in turn, several times, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder that ortlm built")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="by default the physical cores")
    parser.add_argument("--only", choices=sorted(_MEASURE), action="append", help="leave out the others")
    parser.add_argument("--measure", choices=sorted(_MEASURE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads is None:
        from ortlm._utils.cpu import physical_cores

        args.threads = physical_cores() or os.cpu_count() or 1
    if args.measure:
        print(json.dumps(_MEASURE[args.measure](str(args.folder), args.prompt, args.new, args.threads)))
        return 0
    names = args.only or list(_MEASURE)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.runs):
        for name in names:
            command = [sys.executable, __file__, str(args.folder), "--measure", name]
            command += ["--prompt", str(args.prompt), "--new", str(args.new), "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{name} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{args.folder}: prompt {args.prompt}, new {args.new}, threads {args.threads}, median of {args.runs}"
    )
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    for name, found in medians.items():
        line = f"{name:<6} {found['step_ms']:8.3f} ms per step"
        if name != "ortlm" and "ortlm" in medians:
            line += f", ortlm takes {medians['ortlm']['step_ms'] / found['step_ms']:.3f} of it"
        print(line)
    if "ortlm" in medians:
        print(
            f"next to ONNX Runtime: greedy {medians['ortlm']['greedy_overhead_ms']:.3f} ms, "
            f"temperature + top-k + top-p {medians['ortlm']['sampled_overhead_ms']:.3f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
