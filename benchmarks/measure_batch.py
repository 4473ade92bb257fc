"""How much faster `ortlm batch` answers a file of requests than one request after the other.

    python benchmarks/measure_batch.py DIR --requests 200 --sample 25 --batch 16 --json OUT

The requests are mixed: prompts of 16 to 128 random tokens, 8 to 64 new tokens each, drawn from a seed. They
go through what ``ortlm batch`` runs, loading and writing results included. Sequential generation is measured on
every n-th of them with ``lm.generate``, before and after the batches, and the better one counts. Both are compared
by tokens generated per second. How many greedy answers of the sample are the same is told: kernels for one row may
round in another way than those for several, and random prompts have many tokens that are nearly equally likely.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ortlm
from ortlm.batch.results import Counts, shards_of
from ortlm.batch.run import BatchOptions, run_batch


class _Silent:
    """A watcher that shows nothing."""

    def started(self, rows: int, counts: Counts) -> None:
        """Begin."""

    def advanced(self, counts: Counts) -> None:
        """Note nothing: the whole run counts."""


def drawn(count: int, vocabulary: int, seed: int) -> list[tuple[list[int], int]]:
    """Return prompts with how many tokens each is to have."""
    random_ = random.Random(seed)
    return [
        (
            [random_.randrange(10, vocabulary) for _ in range(random_.randint(16, 128))],
            random_.randint(8, 64),
        )
        for _ in range(count)
    ]


def sequential(lm: ortlm.LanguageModel, rows: list[tuple[list[int], int]]) -> tuple[float, list[str]]:
    """Return the tokens per second of one request after the other, and the answers."""
    texts, tokens = [], 0
    began = time.perf_counter()
    for ids, most in rows:
        made = lm.generate(ids, max_new_tokens=most, temperature=0, ignore_eos=True, reuse_cache=False)
        texts.append(made.text)
        tokens += len(made.token_ids)
    return tokens / (time.perf_counter() - began), texts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--sample", type=int, default=25, help="of them, for sequential generation")
    parser.add_argument("--batch", default="16", help="batch sizes, with commas between them")
    parser.add_argument(
        "--vocabulary", type=int, default=2000, help="prompts are drawn from the ids below it"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = drawn(args.requests, args.vocabulary, args.seed)
    sample = rows[:: max(1, args.requests // args.sample)][: args.sample]
    results: dict[str, Any] = {"requests": args.requests, "sample": len(sample), "batch": []}
    lm = ortlm.load(args.folder, threads=args.threads, prefix_caches=0)
    lm.generate(sample[0][0], max_new_tokens=4)
    speed, texts = sequential(lm, sample)
    print(f"one after the other: {speed:.1f} tokens/s ({len(sample)} requests)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for number, (ids, most) in enumerate(rows):
                how = {"max_tokens": most, "temperature": 0, "ignore_eos": True}
                body = {"prompt": ids, **how}
                row = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
                stream.write(json.dumps(row) + "\n")
        for size in map(int, args.batch.split(",")):
            out = Path(folder) / f"results-{size}"
            options = BatchOptions(str(args.folder), path, out, batch=size, machine={"threads": args.threads})
            began = time.perf_counter()
            counts = run_batch(options, _Silent())
            seconds = time.perf_counter() - began
            if counts.failed or counts.done != args.requests:
                sys.exit(f"{counts.failed} requests failed, {counts.done} are done.")
            found = {row["custom_id"]: row["response"]["body"] for row in shards_of(out, "output")}
            results["batch"].append(
                {"size": size, "seconds": seconds, "tokens": counts.new_tokens, "texts": _texts(found)}
            )
            print(
                f"batch of {size:2}: {counts.new_tokens / seconds:.1f} tokens/s, loading included "
                f"({args.requests} requests, {counts.new_tokens} tokens in {seconds:.1f} s)",
                flush=True,
            )
    again, _ = sequential(lm, sample)
    speed = max(speed, again)
    step = max(1, args.requests // args.sample)
    for entry in results["batch"]:
        same = sum(entry["texts"][str(step * i)] == text for i, text in enumerate(texts))
        del entry["texts"]
        entry["speedup"] = entry["tokens"] / entry["seconds"] / speed
        entry["same_answers"] = same
        print(
            f"batch of {entry['size']:2}: {entry['speedup']:.2f} times {speed:.1f} tokens/s; "
            f"{same} of {len(texts)} answers of the sample are the same"
        )
    results["sequential_tokens_per_second"] = speed
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _texts(found: dict[str, Any]) -> dict[str, str]:
    return {name: body["choices"][0]["text"] for name, body in found.items()}


if __name__ == "__main__":
    main()
