"""What a conversation costs: later turns, prompt caches, memory, and threads next to each other.

    python benchmarks/measure_conversation.py DIR --history 1000 --runs 5

Prints the time to the first token of a second turn and of a restored prompt as a share of a cold prefill; the
cache that 200 tokens of chat allocate; resident memory over many generations; how two threads share the machine,
and how late a third one wakes up while a long prompt is read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

import ortlm


def first_token(generator: ortlm.Generator, ids: list[int]) -> float:
    """Return the seconds from the append to the first token."""
    began = time.perf_counter()
    generator.append(ids)
    generator.step()
    return time.perf_counter() - began


def turns(lm: ortlm.LanguageModel, history: int, runs: int) -> None:
    """Measure a cold prefill of history and question, a second turn, and a restored history."""
    rng = np.random.default_rng(0)
    cold, second, restored = [], [], []
    for _ in range(runs):
        past, more = (rng.integers(0, lm.vocab_size, n).tolist() for n in (history, 24))
        cold.append(first_token(lm.generator(), [*past, *more]))
        warm = lm.generator()
        warm.append(past)
        second.append(first_token(warm, more))
        with tempfile.TemporaryDirectory() as folder:
            first = lm.generator()
            first.append(past)
            first.save(Path(folder) / "prompt.cache")
            began = time.perf_counter()
            again = lm.generator()
            again.restore(Path(folder) / "prompt.cache")
            again.append(more)
            again.step()
            restored.append(time.perf_counter() - began)
    base = statistics.median(cold)
    print(f"history of {history} tokens, cold: first token after {base:.3f} s")
    for name, seconds in (("second turn", second), ("restored from disk", restored)):
        print(f"  {name}: {statistics.median(seconds):.3f} s, {statistics.median(seconds) / base:.1%}")


def memory(lm: ortlm.LanguageModel, generations: int) -> None:
    """Measure what 200 tokens allocate, and whether many generations leave anything behind."""
    generator = lm.generator(max_new_tokens=150, ignore_eos=True)
    generator.append(list(range(50)))
    while not generator.done:
        generator.step()
    each = lm.cache_bytes_per_token
    size = generator.loop.cache.nbytes
    print(f"200 tokens: a cache of {size // each} tokens, {size / 1e6:.0f} MB")
    process = psutil.Process()
    sizes = []
    for number in range(generations):
        lm.generate(list(range(number, number + 20)), max_new_tokens=4, temperature=1.0, ignore_eos=True)
        if number % max(1, generations // 10) == 0 or number == generations - 1:
            sizes.append(process.memory_info().rss)
    print(
        f"resident after generations 1 … {generations}: " + ", ".join(f"{s / 1e6:.0f}" for s in sizes) + " MB"
    )
    print(f"  last against the second mark: {sizes[-1] / sizes[1] - 1:+.2%}")


def threads(lm: ortlm.LanguageModel, history: int) -> None:
    """Measure two threads that decode at once, and a third that only wants to wake up in time."""

    def decode(count: list[float], until: threading.Event) -> None:
        generator = lm.generator(ignore_eos=True)
        generator.append(list(range(20)))
        while not until.is_set() and not generator.done:
            generator.step()
            count.append(time.perf_counter())

    def seconds(work: list[threading.Thread], stop: threading.Event, duration: float) -> None:
        for thread in work:
            thread.start()
        time.sleep(duration)
        stop.set()
        for thread in work:
            thread.join()

    for workers in (1, 2):
        stop, counts = threading.Event(), [[] for _ in range(workers)]
        seconds([threading.Thread(target=decode, args=(c, stop)) for c in counts], stop, 5.0)
        print(f"{workers} threads decoding: " + ", ".join(f"{len(c) / 5:.1f}" for c in counts) + " tokens/s")

    late: list[float] = []
    stop = threading.Event()

    def wake() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            time.sleep(0.005)
            late.append(1e3 * (time.perf_counter() - began - 0.005))

    for name, busy in (("idle", False), ("a long prefill", True)):
        late.clear()
        stop.clear()
        thread = threading.Thread(target=wake)
        thread.start()
        began = time.perf_counter()
        if busy:
            lm.generator().append(np.random.default_rng(1).integers(0, lm.vocab_size, history).tolist())
        else:
            time.sleep(2.0)
        took = time.perf_counter() - began
        stop.set()
        thread.join()
        print(
            f"a thread that sleeps 5 ms next to {name} ({took:.1f} s) wakes up late by "
            f"{statistics.median(late):.2f} ms in the median, {max(late):.1f} ms at most"
        )
    stop, quick = threading.Event(), []
    thread = threading.Thread(target=decode, args=(quick, stop))
    thread.start()
    time.sleep(1.0)
    began = time.perf_counter()
    lm.generator().append(np.random.default_rng(1).integers(0, lm.vocab_size, history).tolist())
    ended = time.perf_counter()
    stop.set()
    thread.join()
    gaps = np.diff([t for t in quick if began < t < ended])
    if len(gaps):
        print(
            f"a thread that decodes next to a long prefill: {1e3 * np.median(gaps):.0f} ms per token, "
            f"{1e3 * gaps.max():.0f} ms at most"
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--generations", type=int, default=500)
    args = parser.parse_args()
    lm = ortlm.load(args.folder)
    turns(lm, args.history, args.runs)
    memory(lm, args.generations)
    threads(lm, 2 * args.history)
    return 0


if __name__ == "__main__":
    sys.exit(main())
