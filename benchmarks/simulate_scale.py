"""What N machines give: a simulation with service times that were measured on one.

    python benchmarks/simulate_scale.py measure DIR --json TIMES     # one machine's times; needs Ray for the
    driver's python benchmarks/simulate_scale.py simulate TIMES --json OUT    # tables for docs/scale.md

``measure`` takes the shortest of several runs: what the machine needs when nothing else runs. Of the process that
hands out rows it takes the processor time per task, with workers that do nothing.

``simulate`` knows each machine as B slots, one for each row of its batch. A row keeps its slot for as long as
the batch takes for its tokens, and for the prefill of the rows next to it. A batch: one process hands out
rows in order, each at a cost; machines take the next one as a slot is free. A service: requests arrive at
random, each goes to the shorter queue of two machines that are drawn, as Ray Serve does.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 8
# Tokens of prompt and answer that a row has on average, drawn between a quarter of it and 1.75 times as much.
PROMPT, ANSWER = 256, 128
PRICE = 0.10


def best(run: Callable[[], None], repeat: int = 12) -> float:
    """Return the shortest time of ``run`` in seconds."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def measured(folder: Path, threads: int | None) -> dict[str, Any]:
    """Return the service times of the model in ``folder`` on this machine."""
    import ortlm

    began = time.perf_counter()
    lm = ortlm.load(folder, threads=threads, prefix_caches=0)
    load_seconds = time.perf_counter() - began
    drawn = random.Random(1)
    prompt = [drawn.randrange(10, 2000) for _ in range(PROMPT)]
    loop = lm.loop()

    def prefill() -> None:
        loop.start()
        loop.append([prompt])

    steps = {}
    for size in (1, 2, 4, 8, 16):
        loop.start(size)
        loop.append([prompt] * size)
        loop.step([5] * size)

        def step(size: int = size) -> None:
            loop.step([5] * size)

        steps[str(size)] = best(step, 60)
    return {
        "model": folder.resolve().name,
        "threads": threads,
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": PROMPT / best(prefill),
        "step_seconds": steps,
    }


class Idle:
    """A worker that does nothing, to see what handing out tasks costs."""

    async def begin(self, models: Any, pieces: Any) -> str:
        """Return the version."""
        from ortlm._version import __version__

        return __version__

    async def work(self, rows: list[Any]) -> list[Any]:
        """Return results as large as real ones."""
        from ortlm.batch.answering import Result

        text = "answer " * ANSWER
        return [
            Result(row.number, {"custom_id": str(row.number), "response": text}, failed=False) for row in rows
        ]


def driver_seconds(tasks: int = 2000, rows: int = 4) -> dict[str, float]:
    """Return the processor time that this process needs for each task of ``rows``, writing results included."""
    import tempfile

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ortlm.batch.answering import Result
    from ortlm.batch.results import Identity, Results
    from ortlm.batch.rows import Row
    from ortlm.cluster.connection import connected
    from ortlm.cluster.pool import Pool

    text = b'{"custom_id":"x","body":{"prompt":"%s"}}' % (b"prompt " * PROMPT)
    identity = Identity({"name": "x", "sha256": "0"}, {"name": "x", "sha256": "0"}, {})
    given = [[Row(rows * at + i, 1, text) for i in range(rows)] for at in range(tasks)]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ray = stack.enter_context(connected("local"))
        results = stack.enter_context(Results(Path(folder) / "out", identity, tasks * rows))

        def done(found: list[Result], losses: int) -> None:
            for result in found:
                results.put(result)

        pool: Pool[list[Row], list[Result]] = Pool(ray, Idle, (), [], cpus=1, depth=4)
        began = time.process_time()
        pool.run(given, done, lambda *_: [])
        used = time.process_time() - began
    return {"rows_per_task": rows, "seconds_per_task": used / tasks}


# --- simulation -------------------------------------------------------------------------------------------


class Rows:
    """Rows of a workload, and how long each keeps its slot."""

    def __init__(self, times: dict[str, Any], seed: int) -> None:
        self._drawn = random.Random(seed)
        self._step = times["step_seconds"][str(BATCH)]
        self._prefill = 1 / times["prefill_tokens_per_second"]

    def next(self) -> tuple[float, int]:
        """Return the time that the next row keeps its slot, and its tokens."""
        prompt = round(PROMPT * self._drawn.uniform(0.25, 1.75))
        answer = round(ANSWER * self._drawn.uniform(0.25, 1.75))
        # The other rows of its batch wait for its prefill, and it waits for theirs.
        return BATCH * prompt * self._prefill + answer * self._step, answer


def batch(times: dict[str, Any], machines: int, rows: int, driver: float) -> dict[str, float]:
    """Return what ``machines`` make of ``rows``, each of which costs ``driver`` seconds of the process."""
    drawn = Rows(times, 1)
    begin = times["load_seconds"]
    slots = [begin] * (machines * BATCH)
    heapq.heapify(slots)
    tokens, end = 0, begin
    for number in range(rows):
        seconds, answer = drawn.next()
        ended = max(heapq.heappop(slots), begin + number * driver) + seconds
        heapq.heappush(slots, ended)
        tokens += answer
        end = max(end, ended)
    return {"machines": machines, "seconds": end, "tokens_per_second": tokens / end}


def service(times: dict[str, Any], machines: int, load: float, requests: int) -> dict[str, float]:
    """Return how long requests wait for a slot, at ``load`` of what the machines can do."""
    drawn, choose = Rows(times, 2), random.Random(3)
    mean = sum(drawn.next()[0] for _ in range(2000)) / 2000
    rate = load * machines * BATCH / mean
    # Of each machine: when its slots are free, and how many of its requests have not ended yet.
    free = [[0.0] * BATCH for _ in range(machines)]
    under_way = [0] * machines
    ends: list[tuple[float, int]] = []
    now, waits = 0.0, []
    for number in range(requests):
        now += choose.expovariate(rate)
        while ends and ends[0][0] <= now:
            under_way[heapq.heappop(ends)[1]] -= 1
        one, other = choose.randrange(machines), choose.randrange(machines)
        chosen = min(one, other, key=under_way.__getitem__)
        begun = max(now, heapq.heappop(free[chosen]))
        ended = begun + drawn.next()[0]
        heapq.heappush(free[chosen], ended)
        heapq.heappush(ends, (ended, chosen))
        under_way[chosen] += 1
        # Until the queues are what they will stay.
        if number >= requests // 5:
            waits.append(begun - now)
    waits.sort()
    return {
        "machines": machines,
        "load": load,
        "requests_per_second": rate,
        "wait_mean": sum(waits) / len(waits),
        "wait_95": waits[int(len(waits) * 0.95)],
        "wait_99": waits[int(len(waits) * 0.99)],
    }


def simulated(times: dict[str, Any], price: float) -> dict[str, Any]:
    """Return all tables, and print them as Markdown."""
    found: dict[str, Any] = {"price_per_machine_hour": price, "batch": [], "service": []}
    driver = times["driver"]["seconds_per_task"] / times["driver"]["rows_per_task"]
    print(f"driver: {driver * 1e3:.2f} ms a row, at most {1 / driver:,.0f} rows/s\n")
    print("| machines | rows | time | tokens/s | of linear | per million tokens |\n|---|---|---|---|---|---|")
    single = batch(times, 1, 2_000, 0.0)["tokens_per_second"]
    for each in (2_000, 200):
        for machines in (1, 4, 16, 64, 256, 1024, 4096, 16384):
            rows = machines * each
            if rows > 4_000_000:
                continue
            one = batch(times, machines, rows, driver)
            one["rows"] = rows
            one["of_linear"] = one["tokens_per_second"] / single / machines
            one["price_per_million"] = machines * price / 3600 / one["tokens_per_second"] * 1e6
            found["batch"].append(one)
            print(
                f"| {machines:,} | {rows:,} | {one['seconds'] / 60:,.1f} min | {one['tokens_per_second']:,.0f} | "
                f"{one['of_linear']:.0%} | {one['price_per_million']:.2f} |"
            )
    print("\n| machines | load | requests/s | mean wait | 95 % | 99 % |\n|---|---|---|---|---|---|")
    for machines in (1, 4, 16, 64, 256, 1024):
        for load in (0.5, 0.7, 0.9):
            one = service(times, machines, load, min(400_000, max(20_000, 200 * machines)))
            found["service"].append(one)
            print(
                f"| {machines:,} | {load:.0%} | {one['requests_per_second']:,.2f} | {one['wait_mean']:.2f} s | "
                f"{one['wait_95']:.2f} s | {one['wait_99']:.2f} s |"
            )
    return found


def main() -> None:
    """Measure or simulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["measure", "simulate"])
    parser.add_argument("path", type=Path, help="folder of a model, or what was measured")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--price", type=float, default=PRICE, help="of a machine for an hour")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "measure":
        found = {**measured(args.path, args.threads), "driver": driver_seconds()}
        print(json.dumps(found, indent=1))
    else:
        found = simulated(json.loads(args.path.read_text(encoding="utf-8")), args.price)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
