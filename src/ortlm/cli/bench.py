"""``ortlm bench``: how fast a built model is on this machine, and how near to what the machine can do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from ortlm._utils.formatting import readable_bytes, readable_count
from ortlm._utils.limits import MOST_ROWS, MOST_THREADS
from ortlm.cli import Subparsers, output
from ortlm.cli.machine import add_device, device_of
from ortlm.cli.output import say, tell
from ortlm.cli.settings import check_count
from ortlm.errors import BadOption

_EXAMPLES = """\
examples:
  ortlm bench phi
  ortlm bench phi --batch 1,4,16 --context 128,2048 --threads 1,2,4
  ortlm bench phi --runs 9 --json > phi.json

Medians of all runs, with minimum and maximum. Each run measures everything
once, in new processes. Decoding is greedy and does not stop early.
docs/bench.md explains each figure.
"""
_PIPE_WIDTH = 160


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure how fast a built model is on this machine",
        description="Measure prefill, decode, load time and memory, and what share of the machine's\n"
        "memory bandwidth and int8 peak they reach.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument("--batch", default="1", metavar="N,…", help="batch sizes (default: 1)")
    parser.add_argument(
        "--context", default="128,512", metavar="N,…", help="tokens of each prompt (default: 128,512)"
    )
    parser.add_argument("--new", type=int, default=32, metavar="N", help="tokens to decode (default: 32)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="number of runs (default: 5)")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", metavar="N,…", help="threads (default: physical cores)")
    add_device(machine)
    machine.add_argument(
        "--buffer-mb",
        type=int,
        metavar="N",
        help="buffer to measure memory bandwidth with (default: 1000, or four times the last-level cache)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure."""
    from ortlm.artifact import open_artifact
    from ortlm.artifact.fields import MOST_TOKENS

    batches, contexts = numbers(args.batch, "--batch"), numbers(args.context, "--context")
    threads = None if args.threads is None else numbers(args.threads, "--threads")
    check_count("--batch", max(batches), MOST_ROWS)
    check_count("--threads", max(threads or (1,)), MOST_THREADS)
    check_count("--new", args.new, MOST_TOKENS)
    check_count("--runs", args.runs, 10_000)
    check_count("--buffer-mb", args.buffer_mb, 1_000_000)
    where = device_of(args)
    artifact = open_artifact(args.model)
    from ortlm.bench.study import Study, conduct

    study = Study(
        batches=batches,
        contexts=contexts,
        new=args.new,
        runs=args.runs,
        device=where["device"],
        device_options=tuple(where["device_options"].items()),
        buffer=None if args.buffer_mb is None else args.buffer_mb * 1_000_000,
        **({} if threads is None else {"threads": threads}),
    )

    report = conduct(artifact, study, (lambda line: None) if args.quiet else tell)
    if args.json:
        say(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        _show(report)
    return 0


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """Return the numbers that "1,2,4" lists. Raises BadOption unless each is at least 1 and comes once."""
    listed = []
    for part in text.split(","):
        word = part.strip()
        if not (word.isascii() and word.isdigit() and len(word) < 19) or int(word) < 1:
            raise BadOption(
                f"{flag} takes numbers from 1 on, with commas between them, as 1,2,4; got {text!r}."
            )
        listed.append(int(word))
    if len(set(listed)) < len(listed):
        raise BadOption(f"{flag} names a number twice; got {text!r}.")
    return tuple(listed)


def _show(report: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    # Without a terminal, rich would break lines at 80 characters.
    console = output.console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for line in _heading(report):
        console.print(Text(line), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (
        "threads", "batch", "context", "prefill\ntokens/s", "of int8\npeak", "first token\ns",
        "decode\ntokens/s", "step\nms", "bytes per\ntoken", "of band-\nwidth", "peak\nmemory",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in report["results"]:
        table.add_row(*map(Text, _cells(row)))
    console.print()
    console.print(table)
    for line in _remarks(report):
        console.print(Text(line), soft_wrap=True)


def _heading(report: Mapping[str, Any]) -> list[str]:
    machine, artifact = report["environment"], report["artifact"]
    cores = machine["physical_cores"] or machine["logical_processors"]
    weights, cache = (
        readable_bytes(artifact["weight_bytes"]),
        readable_bytes(artifact["cache_bytes_per_token"]),
    )
    count = readable_count(artifact["weights"])
    lines = [
        f"{artifact['name']}: {count} weights in matmuls, {weights} in memory; KV cache {cache} per token",
        f"{machine['cpu']}, {cores} cores; onnxruntime {machine['onnxruntime']}",
    ]
    for row in report["threads"]:
        private = row["loaded_private_bytes"]
        memory = f", {readable_bytes(private['median'])} private memory" if private else ""
        rates, peak = row["int8_operations_per_second"], row["int8_peak"]
        others = "".join(f", {name} {_spread(rate, 1e12, 2)}" for name, rate in rates.items() if name != peak)
        lines.append(
            f"threads {row['threads']}: bandwidth {_spread(row['bandwidth_bytes_per_second'], 1e9)} GB/s; "
            f"int8 peak {_spread(rates[peak], 1e12, 2)} TOPS ({peak}{others}); "
            f"load {_spread(row['load_seconds'], 1, 2)} s{memory}"
        )
    return lines


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["threads"]),
        str(row["batch"]),
        str(row["context"]),
        _spread(row["prefill_tokens_per_second"], 1),
        _share(row["prefill_int8_share"]),
        _spread(row["first_token_seconds"], 1, 3),
        _spread(row["decode_tokens_per_second"], 1),
        _spread(row["step_seconds"], 1e-3, 2),
        readable_bytes(row["bytes_per_token"]["total"]),
        _share(row["decode_bandwidth_share"]),
        readable_bytes(row["peak_bytes"]["median"]) if row["peak_bytes"] else "unknown",
    ]


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _remarks(report: Mapping[str, Any]) -> list[str]:
    """Return what needs an explanation."""
    options, machine = report["options"], report["threads"][0]
    buffer = readable_bytes(machine["bandwidth_buffer_bytes"])
    lines = [
        f"median (min-max) of {options['runs']} runs, {options['new']} new tokens; bandwidth by reading {buffer}"
    ]
    cache = machine["last_cache_bytes"]
    if cache and machine["bandwidth_buffer_bytes"] < 2 * cache:
        lines.append(
            f"the buffer is not much larger than the last-level cache ({readable_bytes(cache)}), so the bandwidth "
            "may be the cache's; --buffer-mb and free memory decide its size"
        )
    if cache and report["artifact"]["weight_bytes"] < cache:
        lines.append(
            f"the weights fit into the last-level cache ({readable_bytes(cache)}), so steps may read them faster "
            "than from memory: shares above 100 % are possible"
        )
    switch = report["artifact"]["rope_switch_tokens"]
    lines += [
        f"context {row['context']}: decode crosses {switch} tokens (longrope short/long switch), where everything "
        "is recomputed once"
        for row in report["results"]
        if row["recomputed"]
        and row["batch"] == options["batches"][0]
        and row["threads"] == options["threads"][0]
    ]
    return lines


def _spread(figures: Mapping[str, float], unit: float, digits: int = 1) -> str:
    median, low, high = (f"{figures[key] / unit:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}-{high})"
