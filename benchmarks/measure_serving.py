"""How many tokens per second a server gives, by the number of streams, and how long its clients wait.

    python benchmarks/measure_serving.py DIR --streams 1,2,4,8,16 --prompt 512 --tokens 64 --json OUT

Starts ``ortlm serve DIR`` and drives it in a closed loop: each of N clients sends its next request when its last
one has ended. Prompts are random tokens, different in every request, so that no prefix is shared. Reported for
each N: tokens per second of all together, the time to the first token, and the gaps between tokens (median, 99th
percentile, longest). Then: the time to the first token of a prompt whose first --prefix tokens an earlier one had,
against the cold time; and the longest gap in a running stream while a prompt of --long tokens is computed.
With --url another server that speaks OpenAI's completions and takes token ids is driven instead.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Client:
    """Sends completions to ``url`` and notes when each piece of an answer came."""

    def __init__(self, url: str, model: str, vocabulary: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._model, self._vocabulary = model, vocabulary

    def prompt(self, length: int, seed: int) -> list[int]:
        """Return ``length`` random tokens."""
        drawn = random.Random(seed)
        return [drawn.randrange(10, self._vocabulary) for _ in range(length)]

    def stream(self, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
        """Return when a request was sent, and when each of its tokens came."""
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "logprobs": 0,
        }  # fmt: skip
        line = http.client.HTTPConnection(self._host, self._port, timeout=3600)
        began = time.perf_counter()
        line.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = line.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {answer.read()[:300]!r}")
        times = []
        for event in answer:
            if event.startswith(b"data: {"):
                if event.startswith(b'data: {"error"'):
                    raise RuntimeError(event.decode())
                times.append(time.perf_counter())
        line.close()
        return began, times


def closed_loop(client: Client, *, streams: int, prompt: int, tokens: int, requests: int) -> dict[str, float]:
    """Return the figures of ``streams`` clients at once."""
    first: list[float] = []
    gaps: list[float] = []
    speeds: list[float] = []
    counts: list[int] = []

    def work(number: int) -> None:
        for turn in range(requests):
            ids = client.prompt(prompt, 1_000_003 * streams + 1009 * number + turn)
            began, times = client.stream(ids, tokens)
            first.append(times[0] - began)
            gaps.extend(later - earlier for earlier, later in pairwise(times))
            counts.append(len(times))
            speeds.append((len(times) - 1) / (times[-1] - times[0]))

    began = time.perf_counter()
    with ThreadPoolExecutor(streams) as threads:
        list(threads.map(work, range(streams)))
    seconds = time.perf_counter() - began
    ordered = sorted(gaps)
    return {
        "streams": streams,
        "tokens_per_second": sum(counts) / seconds,
        "decode_tokens_per_second": streams * statistics.median(speeds),
        "first_token_seconds": statistics.median(first),
        "gap_median": statistics.median(gaps),
        "gap_99": ordered[int(len(ordered) * 0.99)],
        "gap_longest": ordered[-1],
    }


def prefix(client: Client, length: int) -> dict[str, float]:
    """Return the time to the first token, cold and with a prefix that an earlier prompt had."""
    cold, warm = [], []
    for seed in range(3):
        shared = client.prompt(length, 77_000 + seed)
        for number, found in ((1, cold), (2, warm)):
            began, times = client.stream([*shared, *client.prompt(16, 78_000 + 10 * seed + number)], 1)
            found.append(times[0] - began)
    return {
        "prefix_tokens": length,
        "cold_seconds": statistics.median(cold),
        "warm_seconds": statistics.median(warm),
    }


def stall(client: Client, length: int, tokens: int) -> dict[str, float]:
    """Return the longest gap of a running stream while a prompt of ``length`` tokens is computed."""
    with ThreadPoolExecutor(1) as other:
        running = other.submit(client.stream, client.prompt(32, 5), tokens)
        time.sleep(0.5)
        began, times = client.stream(client.prompt(length, 6), 1)
        found = running.result()[1]
    gaps = [later - earlier for earlier, later in pairwise(found) if later > began and earlier < times[0]]
    return {
        "long_prompt_tokens": length,
        "its_first_token_seconds": times[0] - began,
        "longest_gap_of_another": max(gaps, default=0.0),
    }


def start(folder: Path, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start a server and return it with its address."""
    command = [sys.executable, "-m", "ortlm", "serve", f"model={folder}", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r" at (http://\S+)/v1", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[1]
    sys.exit("the server did not start.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--url", help="drive this server instead of starting one")
    parser.add_argument("--model", default="model")
    parser.add_argument(
        "--vocabulary", type=int, default=2000, help="prompts are drawn from the ids below it"
    )
    parser.add_argument("--streams", default="1,2,4,8,16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--prefix", type=int, default=1000)
    parser.add_argument("--long", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    counts = [int(word) for word in args.streams.split(",")]
    process = None
    if args.url is None:
        threads = [] if args.threads is None else ["--threads", str(args.threads)]
        process, url = start(args.folder, ["--batch-size", str(max(counts)), *threads])
    else:
        url = args.url
    client = Client(url, args.model, args.vocabulary)
    results: dict[str, Any] = {}
    try:
        client.stream(client.prompt(args.prompt, 1), 4)
        results["streams"] = []
        for count in counts:
            found = closed_loop(
                client, streams=count, prompt=args.prompt, tokens=args.tokens, requests=args.requests
            )
            results["streams"].append(found)
            print(
                f"{count:3} streams: {found['tokens_per_second']:7.1f} tokens/s with prefill, "
                f"{found['decode_tokens_per_second']:7.1f} while decoding; "
                f"first token {found['first_token_seconds']:.2f} s, "
                f"gaps {found['gap_median'] * 1000:.0f} / {found['gap_99'] * 1000:.0f} / "
                f"{found['gap_longest'] * 1000:.0f} ms (median, 99 %, longest)",
                flush=True,
            )
        if args.prefix:
            results["prefix"] = found = prefix(client, args.prefix)
            share = found["warm_seconds"] / found["cold_seconds"]
            print(
                f"first token after {args.prefix} shared tokens: {found['warm_seconds']:.3f} s, "
                f"cold {found['cold_seconds']:.3f} s ({share:.1%})",
                flush=True,
            )
        if args.long:
            results["stall"] = found = stall(client, args.long, 4 * args.tokens)
            print(
                f"while {args.long} tokens are computed ({found['its_first_token_seconds']:.2f} s), the longest "
                f"gap of another stream is {found['longest_gap_of_another'] * 1000:.0f} ms"
            )
    finally:
        if process is not None:
            process.terminate()
            process.wait()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
