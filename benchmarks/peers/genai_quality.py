"""Models of onnxruntime-genai's builder by its algorithms, run by its own runtime, and what each loses.

    python genai_quality.py CHECKPOINT WORK --rows rows.npy --logits reference.npy --types default,k_quant_mixed

A type is ``default`` or a value of ``algo_config``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray
from quality_figures import Logits, main


def make(source: Path, work: Path, name: str, args: argparse.Namespace) -> tuple[int, Logits]:
    """Build the checkpoint folder ``source`` for the CPU by the algorithm ``name`` and open it."""
    out = work / "official"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["-i", str(source), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(work / "official-cache")]
    if name != "default":
        flags += ["--extra_options", f"algo_config={name}"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the official builder ended with {done.returncode}: {done.stderr[-500:]}")
    model = og.Model(str(out))
    size = sum(f.stat().st_size for f in out.glob("model.onnx*"))

    def logits(row: NDArray[np.int64]) -> NDArray[np.float32]:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(row))
        generator = og.Generator(model, params)
        generator.append_tokens(row.astype(np.int32))
        return np.asarray(generator.get_output("logits"), np.float32)[0]

    return size, logits


if __name__ == "__main__":
    main(make, __doc__ or "")
