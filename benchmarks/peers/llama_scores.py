"""Log-likelihoods by llama.cpp: reads lines of JSON from stdin and answers each with one.

    python llama_scores.py MODEL.gguf CONTEXT

A line is [tokens, count]; the answer is the log-likelihood of the last ``count`` tokens after those before them,
and whether each was the most likely one.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def main(path: str, context: int) -> None:
    """Answer until there is nothing more to read."""
    model = llama_cpp.Llama(path, n_ctx=context, n_batch=context, logits_all=True, verbose=False)
    for line in sys.stdin:
        tokens, count = json.loads(line)
        model.reset()
        model.eval(tokens[:-1])
        logits = np.array(model.scores[len(tokens) - 1 - count : len(tokens) - 1], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        wanted = np.array(tokens[-count:])
        total = float(logs[np.arange(count), wanted].sum())
        print(json.dumps([total, bool((logits.argmax(axis=1) == wanted).all())]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
