"""What the scripts that measure a peer's quantized models share: the command line, and the figures.

    python SCRIPT SOURCE WORK --rows rows.npy --logits reference.npy --types NAME,NAME

``rows`` int64 [N, S] are tokens, ``logits`` float32 [N, S, V] what the float model says of them. One line of JSON
for each type: bytes of the weights, KL divergence in nats per token, top-1 agreement.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
# Makes the model of a type in a folder; returns its bytes, and what gives the logits [S, V] of a row.
Make = Callable[[Path, Path, str, argparse.Namespace], tuple[int, Logits]]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the log-probabilities of ``logits`` [S, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def compare(logits: Logits, rows: NDArray[np.int64], reference: NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean KL divergence from ``reference`` and the top-1 agreement."""
    total, same = 0.0, 0
    for row, wanted in zip(rows, reference, strict=True):
        got, want = log_softmax(logits(row)), log_softmax(np.asarray(wanted))
        total += float((np.exp(want) * (want - got)).sum())
        same += int((want.argmax(-1) == got.argmax(-1)).sum())
    return total / rows.size, same / rows.size


def main(make: Make, about: str) -> None:
    """Read the command line, make each type, measure it, and print its figures."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--types", required=True)
    parser.add_argument("--importance", type=Path, help="mean squares of each matrix's inputs (.npz)")
    parser.add_argument("--calibration", type=Path, help="tokens [N, S] to calibrate on (.npy)")
    args = parser.parse_args()
    rows, reference = np.load(args.rows), np.load(args.logits, mmap_mode="r")
    for name in args.types.split(","):
        size, logits = make(args.source, args.work, name, args)
        divergence, same = compare(logits, rows, reference)
        print(json.dumps({"name": name, "bytes": size, "kld": divergence, "top1": same}), flush=True)
