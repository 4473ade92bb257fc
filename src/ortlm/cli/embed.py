"""``ortlm embed``: texts to embeddings."""

from __future__ import annotations

import argparse
import json
import sys

from ortlm._utils.limits import MOST_ROWS
from ortlm.cli import Subparsers
from ortlm.cli.machine import add_machine, device_of, without_blas_threads
from ortlm.cli.output import say
from ortlm.cli.settings import check_count, read_file, read_stdin, refuse
from ortlm.errors import BadOption

_EXAMPLES = """\
examples:
  ortlm embed phi "A cat sleeps." "A dog barks."
  ortlm embed phi -f texts.txt --pooling last > embeddings.jsonl

The model must be built with --extra_options include_hidden_states=true.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "embed",
        help="embed texts",
        usage="ortlm embed MODEL [TEXT ...] [options]",
        description="Embed texts: write one line with a JSON list of numbers for each text.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", help="text to embed (default: each line of stdin)"
    )
    parser.add_argument("-f", "--file", metavar="FILE", help="embed each line of a file")
    parser.add_argument(
        "--pooling",
        choices=("mean", "last", "first"),
        default="mean",
        help="mean of all tokens (default), or the last or first token",
    )
    parser.add_argument("--no-normalize", action="store_true", help="do not scale embeddings to length 1")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="batch size (default: 8)")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Embed."""
    refuse("TEXT", [("--file", bool(args.texts) and args.file is not None)], "give one of them.")
    check_count("--batch-size", args.batch_size, MOST_ROWS)
    texts = args.texts or _lines(args.file)
    if not texts:
        raise BadOption("there is no text. Give some, or one on each line of a file or of stdin.")
    for number, text in enumerate(texts, 1):
        if not text:
            raise BadOption(f"text {number} is empty, and has no embedding. Remove that line.")
    without_blas_threads()
    from ortlm.runtime.language_model import load

    lm = load(args.model, threads=args.threads, **device_of(args))
    for at in range(0, len(texts), args.batch_size):
        group = texts[at : at + args.batch_size]
        vectors = lm.embed(
            group, pooling=args.pooling, normalize=not args.no_normalize, batch=args.batch_size
        )
        for vector in vectors:
            say(json.dumps(vector.tolist()))
    return 0


def _lines(path: str | None) -> list[str]:
    if path is not None and path != "-":
        text = read_file(path, "--file")
    elif sys.stdin.isatty():
        raise BadOption("TEXT is missing. Give some, or pipe one in on each line.")
    else:
        text = read_stdin()
    return text.removesuffix("\n").split("\n") if text else []
