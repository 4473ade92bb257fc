"""``ortlm batch``: a file of requests to files of answers."""

from __future__ import annotations

import argparse
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ortlm._utils.limits import MOST_ROWS, MOST_THREADS
from ortlm.cli import DONE, Subparsers, output
from ortlm.cli.machine import MOST_MEGABYTES, add_cache, add_machine, add_ray, device_of, prefix_bytes_of
from ortlm.cli.progress import Bars, Pace
from ortlm.cli.settings import check_count
from ortlm.cli.signals import interrupting
from ortlm.cluster.connection import import_ray
from ortlm.errors import BadOption

if TYPE_CHECKING:
    from rich.console import Console

    from ortlm.batch.results import Counts
    from ortlm.batch.run import BatchOptions, Work

_EXAMPLES = """\
examples:
  ortlm batch phi -i requests.jsonl -o results
  ortlm batch phi=./phi-int4 -i requests.parquet -o results --batch-size 32
  ortlm batch phi -i requests.jsonl -o results --ray auto

A request is a line of JSON, as OpenAI's Batch API takes it:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
   "body": {"model": "phi", "messages": [{"role": "user", "content": "Hello"}]}}

results/ gets output-00001.jsonl and errors-00001.jsonl. The same command
resumes a run that was interrupted. See docs/batch.md.
"""
_LINE_SECONDS = 30.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "batch",
        help="answer a file of requests",
        usage="ortlm batch OUT -i FILE -o DIR [options]",
        description="Answer a file of requests in the format of OpenAI's Batch API, each exactly\n"
        "once. Needs ortlm[batch].",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="OUT", help="folder of a built model, or NAME=FOLDER")
    files = parser.add_argument_group("files")
    files.add_argument("-i", "--input", metavar="FILE", required=True, help="requests: JSONL or Parquet")
    files.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the results")
    files.add_argument("--limit", type=int, metavar="N", help="answer the first N requests only")
    work = parser.add_argument_group("requests")
    work.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="requests that run at once (default: 16)"
    )
    add_cache(work)
    work.add_argument(
        "--timeout", type=float, metavar="S", help="longest time of a request (default: no limit)"
    )
    work.add_argument(
        "--retries", type=int, default=2, metavar="N",
        help="try a request again that failed for a reason not its own (default: 2)",
    )  # fmt: skip
    work.add_argument(
        "--remote-images", action="store_true", help="fetch images by URL, from public addresses only"
    )
    work.add_argument("-q", "--quiet", action="store_true", help="no progress")
    add_machine(parser)
    add_ray(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the requests."""
    check_count("--limit", args.limit, 1 << 40)
    check_count("--batch-size", args.batch_size, MOST_ROWS)
    check_count("--prefix-cache", args.prefix_cache, MOST_MEGABYTES, least=0)
    check_count("--retries", args.retries, 100, least=0)
    check_count("--threads", args.threads, MOST_THREADS)
    try:
        from ortlm.batch.run import BatchOptions, run_batch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ortlm":
            raise
        raise BadOption(
            f"ortlm batch needs {error.name}, which is not installed: pip install 'ortlm[batch]'"
        ) from error
    options = BatchOptions(
        model=args.model,
        input=Path(args.input),
        output=Path(args.output),
        limit=args.limit,
        batch=args.batch_size,
        cache_tokens=args.cache_tokens,
        prefix_bytes=prefix_bytes_of(args),
        seconds=args.timeout,
        retries=args.retries,
        remote_images=args.remote_images,
        machine={"threads": args.threads, **device_of(args)},
    )
    progress = _Progress(output.console(stderr=True, quiet=args.quiet), quiet=args.quiet)
    try:
        with interrupting("SIGTERM", "SIGHUP"), progress:
            counts = run_batch(options, progress, _work(args, options))
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"interrupted: {progress.left()} The same command resumes.",)
        raise
    output.tell(progress.summary(counts, args.output))
    return DONE


def _work(args: argparse.Namespace, options: BatchOptions) -> Work | None:
    """Return what answers the rows on a cluster, None for this machine."""
    if args.ray is None:
        return None
    import_ray()
    from ortlm.batch.cluster import answer_on

    return lambda rows, put: answer_on(args.ray, options, rows, put)


class _Progress:
    """Rows, tokens per second and time left: a bar on a terminal, elsewhere a line every half minute."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._bars = Bars(console)
        self._lines = not quiet and not console.is_terminal
        self._pace = Pace()
        self._rows = self._done = self._tokens = 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> _Progress:
        self._bars.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.close()

    def started(self, rows: int, counts: Counts) -> None:
        """Begin with what earlier runs have done."""
        self._rows, self._done = rows, min(counts.done, rows)
        self._tokens = self._at_first = counts.prompt_tokens + counts.new_tokens
        self._resumed = counts.done
        self._began = self._told = time.monotonic()
        self._pace.start(rows, self._done)
        self._bars.start("answering", rows, "rows", done=self._done)
        if counts.done and self._lines:
            output.tell(f"{counts.done:,} of {rows:,} rows were answered before.")

    def advanced(self, counts: Counts) -> None:
        """Count one more row."""
        self._done = min(counts.done, self._rows)
        self._tokens = counts.prompt_tokens + counts.new_tokens
        self._pace.advance(1)
        self._bars.note(self._speed())
        self._bars.advance(1)
        now = time.monotonic()
        if self._lines and now - self._told >= _LINE_SECONDS:
            self._told = now
            output.tell(f"{self._done:,}/{self._rows:,} rows, {self._speed()}, {self._pace.left()} left")

    def left(self) -> str:
        """Say what an interrupted run has done."""
        return (
            f"{self._done:,} of {self._rows:,} rows have their results."
            if self._rows
            else "nothing was done."
        )

    def summary(self, counts: Counts, folder: str) -> str:
        """Say what a run that came to its end has done."""
        seconds = timedelta(seconds=round(time.monotonic() - self._began))
        failed = f"{counts.failed:,} of them errors" if counts.failed else "none of them an error"
        retries = f", {counts.retries:,} retries" if counts.retries else ""
        now = counts.done - self._resumed
        return f"{folder}: {counts.done:,} results, {failed}{retries}; {now:,} in {seconds}, {self._speed()}"

    def _speed(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        return f"{(self._tokens - self._at_first) / seconds:,.1f} tokens/s"
