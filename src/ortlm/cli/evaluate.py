"""``ortlm evaluate``: how far a built model is from its reference, and what it costs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm._utils.limits import MOST_THREADS
from ortlm.artifact import MANIFEST_FILE
from ortlm.artifact.download import is_name
from ortlm.cli import ABOVE_THRESHOLD, DONE, Subparsers, output
from ortlm.cli.machine import add_machine, add_ray, device_of
from ortlm.cli.progress import StatusLine
from ortlm.cli.settings import check_count
from ortlm.cluster.connection import import_ray
from ortlm.errors import BadOption

if TYPE_CHECKING:
    from rich.console import Console

    from ortlm.evaluation.report import Report

_EXAMPLES = """\
examples:
  ortlm evaluate phi
  ortlm evaluate phi --reference phi-fp32 --layers --drift
  ortlm evaluate phi --text handbook.txt --tokens 20000 --max-kld 0.05
  ortlm evaluate phi --json | jq .statistics.kld.value

The figures are those of llama-perplexity's --kl-divergence: the second half of
each chunk is scored.

exit codes: 0 done, 1 failed, 2 usage error, 3 above --max-kld, 130 interrupted
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="compare a built model with the original",
        usage="ortlm evaluate OUT [options]",
        description="Compare a built model with what it was built from, or with another one: KL\n"
        "divergence, perplexity, speed, memory. Writes report.html and report.json, and\n"
        "the headline figures into the model's README.md and ortlm.json.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="OUT", help="folder of a built model")
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--reference",
        metavar="MODEL",
        help="another built model, or a checkpoint: folder, GGUF file or name on the hub (default: what "
        "OUT was built from)",
    )
    what.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text (default: a small corpus of several domains, each shown apart)",
    )
    what.add_argument(
        "--chunk", type=int, metavar="N", help="tokens per chunk (default: 512, or the context)"
    )
    what.add_argument("--tokens", type=int, metavar="N", help="use at most N tokens of the text")
    what.add_argument("--layers", action="store_true", help="measure the error of each layer too")
    what.add_argument(
        "--drift",
        action="store_true",
        help="compare answers to prompts: refusals, format, repetition, language",
    )
    what.add_argument("--no-speed", action="store_true", help="do not measure speed and memory")
    result = parser.add_argument_group("result")
    result.add_argument("-o", "--output", metavar="DIR", help="folder for the reports (default: OUT)")
    result.add_argument(
        "--max-kld",
        type=float,
        metavar="X",
        help="quality threshold: exit with 3 if the mean KL divergence is above X nats",
    )
    result.add_argument("--json", action="store_true", help="print report.json instead of tables")
    result.add_argument("-q", "--quiet", action="store_true", help="no progress")
    add_machine(parser)
    add_ray(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    _check(args)
    # It loads ONNX Runtime, so usage errors come first.
    from ortlm.evaluation.evaluate import evaluate

    err = output.console(stderr=True, quiet=args.quiet)
    with err.status("starting") as status:
        report = evaluate(
            args.model,
            reference=args.reference,
            text=args.text,
            chunk=args.chunk,
            tokens=args.tokens,
            layers=args.layers,
            drift=args.drift,
            speed=not args.no_speed,
            threads=args.threads,
            **device_of(args),
            progress=StatusLine(status),
            ray=args.ray,
        )
    written = report.write(args.output)
    if args.json:
        output.say(report.to_json().removesuffix("\n"))
    else:
        _show(output.console(), report)
    _tell_files(err, report, written)
    return gate(report, args.max_kld)


def _check(args: argparse.Namespace) -> None:
    check_count("--threads", args.threads, MOST_THREADS)
    if args.ray is not None:
        import_ray()
    check_count("--tokens", args.tokens, 1_000_000_000)
    if args.max_kld is not None and not args.max_kld >= 0:
        raise BadOption(f"--max-kld must be 0 or more, in nats; got {args.max_kld}.")
    if args.output is not None and Path(args.output).exists() and not Path(args.output).is_dir():
        raise BadOption(f"-o {args.output} is a file; it takes the folder for the reports.")
    # Told now rather than when everything is measured.
    if args.output is None and is_name(args.model):
        raise BadOption(f"{args.model} is a model on the hub: give a folder for the reports with -o.")
    if args.output is None and Path(args.model).is_dir() and not os.access(args.model, os.W_OK):
        raise BadOption(f"{args.model} may not be written to. Give another folder for the reports with -o.")


def gate(report: Report, limit: float | None) -> int:
    """Return the exit code for a limit of the mean KL divergence, and say if it is missed."""
    kld = report.statistics.kld.value
    if limit is None or kld <= limit:
        return DONE
    output.tell(f"the mean KL divergence is {kld:.6f}, above the limit of {limit:g}.")
    return ABOVE_THRESHOLD


def _show(console: Console, report: Report) -> None:
    from rich.table import Table

    from ortlm.evaluation.statistics import sections

    data = report.data
    text = data["text"]
    console.print(
        f"{data['artifact']['name']} against {data['reference']['name']}: {text['scored_tokens']:,} tokens of "
        f"{text['name']} scored, in {text['chunks']} chunks of {text['chunk_tokens']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for title, rows in sections(report.statistics):
        _print_rows(
            console, title, [(name, value, f"± {error}" if error else "") for name, value, error in rows]
        )
    _show_domains(console, data)
    if data["layers"] is not None:
        snr = data["layers"]["snr"]
        names = [*(f"layer {i}" for i in range(len(snr) - 1)), "head"]
        rows = [
            (name, "no difference" if value is None else f"{value:.2f} dB", "")
            for name, value in zip(names, snr, strict=True)
        ]
        _print_rows(console, "Signal-to-noise ratio", rows)
    if data["drift"] is not None:
        table = Table(title="Drift", title_justify="left", title_style="bold", box=None)
        for name in ("prompts", "number", "same answer", "agreement", "self-agreement", "shared prefix"):
            table.add_column(name, justify="left" if name == "prompts" else "right")
        for name, change in [*data["drift"]["categories"].items(), ("all", data["drift"]["all"])]:
            table.add_row(
                name,
                str(change["prompts"]),
                str(change["same_answer"]),
                f"{change['agreement']:.1%}",
                f"{change['self_agreement']:.1%}",
                f"{change['same_prefix_share']:.1%}",
            )
        console.print(table)
    if data["speed"] is not None:
        _show_speed(console, data["speed"])


def _show_domains(console: Console, data: Mapping[str, Any]) -> None:
    from rich.table import Table

    from ortlm.evaluation.domains import COLUMNS, domain_table

    rows = domain_table(data)
    if not rows:
        return
    table = Table(title="By domain", title_justify="left", title_style="bold", box=None)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _show_speed(console: Console, speed: Mapping[str, Any]) -> None:
    from rich.table import Table

    from ortlm._utils.formatting import readable_bytes

    table = Table(title="Speed and memory", title_justify="left", title_style="bold", box=None)
    for name in ("", "prefill, tokens/s", "first token, ms", "decode, tokens/s", "load, s", "memory"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("artifact", "reference"):
        figures = speed[name]
        if figures is not None:
            memory = figures["resident_bytes"]
            table.add_row(
                name,
                f"{figures['prefill_tokens_per_second']:,.1f}",
                f"{1e3 * figures['first_token_seconds']:,.1f}",
                f"{figures['decode_tokens_per_second']:,.1f}",
                f"{figures['load_seconds']:.2f}",
                readable_bytes(memory) if memory else "unknown",
            )
    console.print(table)


def _print_rows(console: Console, title: str, rows: list[tuple[str, str, str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _tell_files(err: Console, report: Report, written: list[Path]) -> None:
    from ortlm.evaluation.report import HTML_FILE, is_ours

    page = next(path for path in written if path.name == HTML_FILE)
    lines = [f"report: {page}"]
    if not is_ours(report.artifact):
        lines.append(f"{report.artifact} was built by another tool, so its own files were left as they are.")
    elif report.artifact / MANIFEST_FILE not in written:
        lines.append(f"{report.artifact} may not be written to, so its model card was left as it is.")
    for line in lines:
        err.print(line, highlight=False, markup=False, soft_wrap=True)
