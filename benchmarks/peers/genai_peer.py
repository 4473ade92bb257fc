"""onnxruntime-genai: builds with its model builder, runs any folder, with its own number of threads or another."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from figures import figures, main

_PACKAGES = ("onnxruntime-genai", "onnxruntime")


def make(checkpoint: Path, out: Path, options: dict[str, str]) -> None:
    """Build ``checkpoint`` for the CPU."""
    flags = ["-i", str(checkpoint), "-o", str(out), "-p", options["precision"], "-e", "cpu"]
    flags += ["-c", str(out.parent / "genai-builder-cache")]
    subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *flags], check=True)


def measure(folder: str, prompt: int, new: int, threads: int | None) -> dict[str, Any]:
    """Return the figures of one run."""
    import onnxruntime_genai as og

    config_file = Path(folder) / "genai_config.json"
    vocab = json.loads(config_file.read_text(encoding="utf-8"))["model"]["vocab_size"]
    began = time.perf_counter()
    config = og.Config(folder)
    if threads is not None:
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)
    loaded = time.perf_counter() - began

    def decode(ids: list[int], steps: int) -> tuple[float, float]:
        began = time.perf_counter()
        params = og.GeneratorParams(model)
        total = len(ids) + steps + 1
        # A minimum as high as the maximum bars stop tokens.
        params.set_search_options(do_sample=False, max_length=total, min_length=total)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        # The first call only picks from the prompt's logits; each further one runs the model first.
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return middle - began, time.perf_counter() - middle

    return figures(decode, vocab, prompt, new, load=loaded, packages=_PACKAGES)


if __name__ == "__main__":
    main(make, measure, sys.argv[1:])
