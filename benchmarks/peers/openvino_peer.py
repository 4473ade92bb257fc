"""OpenVINO GenAI: exports and compresses with optimum-intel, runs its own pipeline on token ids."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from figures import figures, main

_PACKAGES = ("openvino", "openvino-genai", "nncf", "optimum-intel")


def make(checkpoint: Path, out: Path, options: dict[str, str]) -> None:
    """Export ``checkpoint`` with 4 bits, asymmetric, in groups of 128, the setting of optimum-cli by default."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    compressed = OVWeightQuantizationConfig(bits=4, group_size=128, sym=False, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, quantization_config=compressed
    )
    model.save_pretrained(out)


def measure(folder: str, prompt: int, new: int, threads: int | None) -> dict[str, Any]:
    """Return the figures of one run, from the pipeline's own times."""
    import openvino as ov
    import openvino_genai as genai

    vocab = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    properties = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    began = time.perf_counter()
    pipeline = genai.LLMPipeline(folder, "CPU", **properties)
    loaded = time.perf_counter() - began

    def decode(ids: list[int], steps: int) -> tuple[float, float]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = steps + 1, True, False
        found = pipeline.generate(ov.Tensor(np.array([ids], dtype=np.int64)), config)
        if len(found.tokens[0]) != steps + 1:
            raise SystemExit(f"OpenVINO gave {len(found.tokens[0])} tokens, expected {steps + 1}")
        first = found.perf_metrics.get_ttft().mean / 1000
        total = found.perf_metrics.get_generate_duration().mean / 1000
        return first, total - first

    return figures(decode, vocab, prompt, new, load=loaded, packages=_PACKAGES)


if __name__ == "__main__":
    main(make, measure, sys.argv[1:])
