"""llama.cpp's quantized forms of a GGUF file, and what each loses: run in an environment with llama-cpp-python.

    python llama_quality.py MODEL.gguf WORK --rows rows.npy --logits reference.npy --types Q4_K_M,Q6_K

``rows`` int64 [N, S] are tokens, ``logits`` float32 [N, S, V] what the float model says of them.
``--importance`` is an .npz of the mean squares of each matrix's inputs, by the names of the file's tensors (an
importance matrix). One line of JSON for each type: bytes, KL divergence in nats per token, top-1 agreement.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray


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


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the log-probabilities of ``logits`` [S, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def measure(path: Path, rows: NDArray[np.int64], reference: NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean KL divergence and the top-1 agreement of the model in ``path``."""
    model = llama_cpp.Llama(
        str(path), n_ctx=rows.shape[1], n_batch=rows.shape[1], logits_all=True, verbose=False
    )
    total, same = 0.0, 0
    for row, logits in zip(rows, reference, strict=True):
        model.reset()
        model.eval(row.tolist())
        got = log_softmax(np.asarray(model.scores[: len(row)], np.float32))
        want = log_softmax(np.asarray(logits))
        total += float((np.exp(want) * (want - got)).sum())
        same += int((want.argmax(-1) == got.argmax(-1)).sum())
    return total / rows.size, same / rows.size


def main() -> None:
    """Quantize to each type and measure it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--types", required=True)
    parser.add_argument("--importance", type=Path)
    args = parser.parse_args()
    rows, logits = np.load(args.rows), np.load(args.logits, mmap_mode="r")
    for name in args.types.split(","):
        out = args.work / f"{name}.gguf"
        quantize(args.gguf, out, name, args.importance)
        divergence, same = measure(out, rows, logits)
        print(
            json.dumps({"name": name, "bytes": out.stat().st_size, "kld": divergence, "top1": same}),
            flush=True,
        )
        out.unlink()


if __name__ == "__main__":
    main()
