"""Let AutoRound tune a checkpoint to 4 bits in groups of 64, and export it in GPTQ's format.

    python auto_round_export.py CHECKPOINT OUT CALIBRATION.npy

The tokens are int64 [N, S]. Run in an environment with auto-round and torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

_ITERATIONS = 100


def main(source: Path, out: Path, calibration: Path) -> None:
    """Tune and export."""
    rows = torch.from_numpy(np.load(calibration))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    loader = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    tuned = AutoRound(
        model, tokenizer, bits=4, group_size=64, sym=False, iters=_ITERATIONS, nsamples=len(rows),
        seqlen=rows.shape[1], batch_size=4, dataset=loader, device_map="cpu", amp=False,
    )  # fmt: skip
    tuned.quantize_and_save(str(out), format="auto_gptq")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
