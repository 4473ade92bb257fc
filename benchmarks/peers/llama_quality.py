"""llama.cpp's quantized forms of a GGUF file, and what each loses: run in an environment with llama-cpp-python.

    python llama_quality.py MODEL.gguf WORK --rows rows.npy --logits reference.npy --types Q4_K_M,Q6_K

``--importance`` is an importance matrix, by the names of the file's tensors. The bytes are those of the tensors:
a GGUF file also holds the tokenizer, which other formats store next to the model.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from quality_figures import Logits, main


def quantize(source: Path, out: Path, name: str, importance: Path | None) -> None:
    """Write ``source`` as type ``name`` to ``out``."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    kept = []
    if importance is not None:
        with np.load(importance) as squares:
            entries = (llama_cpp.llama_model_imatrix_data * (len(squares.files) + 1))()
            for entry, key in zip(entries, squares.files, strict=False):
                values = np.ascontiguousarray(squares[key], np.float32)
                kept.append(values)
                entry.name, entry.size = key.encode(), values.size
                entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"llama.cpp could not quantize to {name}: code {code}")


def make(source: Path, work: Path, name: str, args: argparse.Namespace) -> tuple[int, Logits]:
    """Quantize ``source`` to the type ``name`` and open it."""
    out = work / f"{name}.gguf"
    quantize(source, out, name, args.importance)
    length = int(np.load(args.rows, mmap_mode="r").shape[1])
    model = llama_cpp.Llama(str(out), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    # What is mapped stays until the model is closed.
    out.unlink()

    def logits(row: NDArray[np.int64]) -> NDArray[np.float32]:
        model.reset()
        model.eval(row.tolist())
        return np.asarray(model.scores[: len(row)], np.float32)

    return int(llama_cpp.llama_model_size(model.model)), logits


if __name__ == "__main__":
    main(make, __doc__ or "")
