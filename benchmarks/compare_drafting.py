"""Speculative decoding against plain decoding: where everything is accepted, and where nothing is.

    python benchmarks/make_checkpoint.py CONFIG.json hf --layers 8 --chain 400
    ortlm build -i hf -o model -p int4 -e cpu
    python benchmarks/compare_drafting.py model --chain 400 --new 200 --runs 5 [--draft small]

DIR holds a model that repeats (make_checkpoint.py --chain N). Copying: the prompt is a text of N tokens and the
answer repeats it, as in editing. Nothing accepted: tokens are drawn evenly from 64, so that the last two often
occurred before, and what follows is always another. All modes run in turn in one process; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

import ortlm


def evenly(history: Any, logits: Any) -> Any:
    """Make 64 tokens equally likely and bar the others."""
    out = np.full_like(logits, -np.inf)
    out[:, 1000:1064] = 0.0
    return out


def measure(
    lm: ortlm.LanguageModel, ids: list[int], new: int, **options: Any
) -> tuple[float, list[int], Any]:
    """Return tokens per second, the tokens and the timings of one generation."""
    made = lm.generate(ids, max_new_tokens=new, ignore_eos=True, reuse_cache=False, **options)
    return made.timings.tokens_per_second, list(made.token_ids), made.timings


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chain", type=int, default=400, help="tokens after which the model repeats")
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--draft", type=Path, help="a smaller model with the same tokenizer")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    lm = ortlm.load(args.folder, threads=args.threads)
    drafts: dict[str, Any] = {"lookup": "lookup"}
    if args.draft:
        drafts[f"draft model {args.draft.name}"] = ortlm.load(args.draft, threads=args.threads)
    text = list(range(args.chain, 2 * args.chain))
    noise = np.random.default_rng(0).integers(1000, 1064, 400).tolist()
    cases: dict[str, tuple[list[int], dict[str, Any]]] = {
        "copying": (text, {}),
        "nothing accepted": (noise, {"processors": evenly, "temperature": 1.0, "seed": 0}),
    }
    for case, (ids, options) in cases.items():
        speeds: dict[str, list[float]] = {name: [] for name in ("plain", *drafts)}
        for _ in range(args.runs):
            rate, plain, _ = measure(lm, ids, args.new, **options)
            speeds["plain"].append(rate)
            for name, draft in drafts.items():
                rate, tokens, timings = measure(lm, ids, args.new, draft=draft, **options)
                speeds[name].append(rate)
                if case == "copying" and tokens != plain:
                    raise SystemExit(f"{name} gives other tokens than plain decoding")
        base = statistics.median(speeds["plain"])
        print(f"{case}: plain {base:.1f} tokens/s")
        for name in drafts:
            rate = statistics.median(speeds[name])
            print(f"  {name}: {rate:.1f} tokens/s, {rate / base:.2f} times")
        print(f"  last run: {timings.proposed_tokens} proposed, {timings.accepted_tokens} accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
