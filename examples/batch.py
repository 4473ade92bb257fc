"""Continue many prompts together: each step reads the weights once for the whole batch.

Needs any text model, and a file with one prompt per line:

    pip install ortlm
    ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi -p int4 -e cpu
    python batch.py phi prompts.txt --batch-size 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ortlm


def main() -> None:
    """Print the continuation of every prompt, in order."""
    parser = argparse.ArgumentParser(description="Continue the prompts of a file.")
    parser.add_argument("model", help="folder that `ortlm build` wrote")
    parser.add_argument("prompts", type=Path, help="text file, one prompt per line")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per batch; more take more memory")
    args = parser.parse_args()

    lm = ortlm.load(args.model)
    prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    # Rows of a batch wait for the longest, so prompts of similar length go together.
    order = sorted(range(len(prompts)), key=lambda i: len(lm.encode(prompts[i])))
    answers: dict[int, ortlm.Generation] = {}
    seconds, tokens = 0.0, 0
    for at in range(0, len(order), args.batch_size):
        rows = order[at : at + args.batch_size]
        made = lm.generate_batch([prompts[i] for i in rows], max_new_tokens=32)
        answers |= dict(zip(rows, made, strict=True))
        # The timings are those of the whole batch.
        seconds += made[0].timings.prompt_seconds + made[0].timings.decode_seconds
        tokens += made[0].timings.new_tokens

    for i, prompt in enumerate(prompts):
        print(f"--- {i + 1} ({answers[i].finish_reason})\n{prompt}{answers[i]}")
    print(f"--- {len(prompts)} answers, {tokens} tokens in {seconds:.2f} s")


if __name__ == "__main__":
    main()
