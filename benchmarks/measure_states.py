"""Step time and memory of single layers whose states have one size, next to attention, by the length of the text.

    python benchmarks/measure_states.py --work DIR

Layers have the full shape of LFM2-1.2B and of the smallest Qwen3.5, random weights, and a small vocabulary, so
that the head takes no time. A layer takes half of what two more of them add. The states of a long text
are random numbers: time does not depend on them. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ortlm
from ortlm.builder.options import BuildOptions

CONTEXTS = (1_000, 30_000)
_SHARED = {"vocab_size": 1024, "max_position_embeddings": 32_768, "bos_token_id": 1, "eos_token_id": 2}
# Name, the configuration, and what it calls a layer without attention.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "LFM2-1.2B": (
        {
            "model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "hidden_size": 2048,
            "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "conv_L_cache": 3,
        },
        "conv",
    ),
    "Qwen3.5-0.8B": (
        {
            "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 1024,
            "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
            "linear_num_key_heads": 16, "linear_num_value_heads": 16, "tie_word_embeddings": True,
        },
        "linear_attention",
    ),
}  # fmt: skip


def built(name: str, fixed: int, attention: int, work: Path) -> Path:
    """Return a built model of so many layers of each kind."""
    config, kind = MODELS[name]
    folder = work / f"{name}-{fixed}-{attention}"
    if not (folder / "out").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "config").mkdir(parents=True)
        kinds = [kind] * fixed + ["full_attention"] * attention
        (folder / "config" / "config.json").write_text(
            json.dumps(config | _SHARED | {"num_hidden_layers": len(kinds), "layer_types": kinds})
        )
        program = Path(__file__).with_name("make_checkpoint.py")
        made = [str(folder / "config" / "config.json"), str(folder / "checkpoint")]
        subprocess.run([sys.executable, str(program), *made], check=True, stdout=subprocess.DEVNULL)
        ortlm.build(
            folder / "checkpoint", folder / "out", precision="int4", options=BuildOptions(recipe="fast")
        )
        shutil.rmtree(folder / "checkpoint")
    return folder / "out"


def step_seconds(
    lm: ortlm.LanguageModel, context: int, steps: int, clock: Callable[[], float]
) -> tuple[float, int]:
    """Return the median seconds of a step after ``context`` tokens, and the bytes of all states then."""
    random = np.random.default_rng(0)
    loop = lm.loop()
    states = [
        (0.1 * random.standard_normal(state.shape(1, context), dtype=np.float32)).astype(state.dtype.numpy)
        for state in loop.states
    ]
    loop.adopt([[3] * context], states)
    del states
    seconds = []
    for _ in range(steps):
        began = clock()
        loop.step([3])
        seconds.append(clock() - began)
    return statistics.median(seconds[3:]), loop.cache.nbytes


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where models are built, and kept")
    parser.add_argument("--steps", type=int, default=43)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="of the processor, where others use it too")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    print("| layer | context | step, ms | states, MB |\n|---|---|---|---|")
    for name in MODELS:
        shapes = ((1, 1), (3, 1), (1, 3))
        models = [ortlm.load(built(name, *shape, args.work), threads=args.threads) for shape in shapes]
        for context in CONTEXTS:
            found = [
                [step_seconds(lm, context, args.steps, clock) for lm in models] for _ in range(args.rounds)
            ]
            for at, what in ((1, MODELS[name][1]), (2, "attention")):
                seconds = statistics.median(row[at][0] - row[0][0] for row in found) / 2
                held = (found[0][at][1] - found[0][0][1]) / 2
                print(f"| {name} {what} | {context:,} | {1e3 * seconds:.3f} | {held / 1e6:.2f} |", flush=True)
    print(f"\nmost memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
