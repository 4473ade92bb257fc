"""``ortlm generate``: continue a prompt."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ortlm.cli import Subparsers
from ortlm.cli.interrupt import stoppable
from ortlm.cli.machine import add_machine, device_of, without_blas_threads
from ortlm.cli.output import say, tell, write_generated
from ortlm.cli.prompts import prompt_of, read_prompt
from ortlm.cli.settings import add_settings, refuse, settings_of, with_model
from ortlm.errors import BadOption

if TYPE_CHECKING:
    from ortlm.runtime.generation.stream import Stream
    from ortlm.runtime.language_model import LanguageModel
    from ortlm.runtime.sampling.settings import Settings

_EXAMPLES = """\
examples:
  ortlm generate phi "The capital of France is" -n 32
  ortlm generate phi --chat "Write a haiku." --temp 0.8 --seed 1 --n 3
  cat letter.txt | ortlm generate phi --chat --system "Summarize." -
  ortlm generate phi "1, 2, 3," --stop 9 --json | jq .tokens
  ortlm generate phi --chat "Name a city." --json-schema city.json
  ortlm generate phi --chat "Good or bad? Loved it." --choice good --choice bad
  ortlm generate phi -f q.txt --system "$(cat manual.txt)" --cache manual.cache
  ortlm generate phi --chat -f edit-this.txt --lookup -v
  ortlm generate phi-vision "What is shown?" --image a.jpg --image b.png
  ortlm generate phi --batch prompts.jsonl -n 64 > answers.jsonl

exit codes: 0 done, 1 failed, 2 usage error, 130 interrupted
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        usage="ortlm generate MODEL [PROMPT] [options]",
        description="Continue a prompt and write the text to stdout as it comes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="the text to continue; '-' or nothing reads it from stdin (its last line break is dropped)",
    )
    what = parser.add_argument_group("prompt")
    what.add_argument("-f", "--file", metavar="FILE", help="take the prompt from a file")
    what.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the model's chat format, as a user message (default: continue it as is)",
    )
    what.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    what.add_argument(
        "--cache",
        metavar="FILE",
        help="prompt cache: resume from FILE as far as the prompts agree; if it is not there, write it at the end",
    )
    what.add_argument(
        "--batch",
        metavar="FILE",
        help="answer many prompts, a line of JSON each (a text, or an object with prompt), as lines of JSON",
    )
    what.add_argument("--batch-size", type=int, metavar="N", help="batch size (default: 8)")
    add_images(what)
    what.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        help="an image (file, URL or data: URL) before the text; may be repeated; implies --chat, unless "
        "--no-chat is given and tags in the text say where each belongs",
    )
    add_settings(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="write one JSON object instead of the text")
    output.add_argument("-v", "--verbose", action="store_true", help="write speed to stderr at the end")
    add_machine(parser)


def add_images(group: argparse._ActionsContainer) -> None:
    """Add the option for the number of crops per image."""
    group.add_argument(
        "--num-crops",
        type=int,
        metavar="N",
        help="at most N crops per image; more show finer detail and cost more (default: the model's)",
    )


def run(args: argparse.Namespace) -> int:
    """Generate."""
    _check(args)
    without_blas_threads()
    settings = settings_of(args)
    _check_cache(args.cache, settings)
    if args.batch is not None:
        from ortlm.cli.generate_batch import run_batch

        return run_batch(args, settings)
    text = read_prompt(args)
    from ortlm.runtime.language_model import load

    lm = load(args.model, threads=args.threads, **device_of(args))
    settings = with_model(settings, lm, args)
    kept = args.cache is not None and Path(args.cache).exists()
    if kept:
        lm.load_cache(args.cache, adapter=settings.adapter)
    alongside = args.image if args.chat is False else None
    prompt = prompt_of(text, args)
    stream = lm.stream(prompt, images=alongside, num_crops=args.num_crops, settings=settings)
    if not _answer(stream, lm, args, settings):
        return 130
    if args.cache is not None and not kept:
        lm.save_cache(args.cache, adapter=settings.adapter)
    elif kept and not stream.timings.cached_tokens:
        tell(f"{args.cache} begins otherwise; delete it to keep this prompt there.")
    if args.verbose:
        from ortlm.cli.report import summary

        tell(summary(stream.timings))
    return 0


def _check(args: argparse.Namespace) -> None:
    refuse("PROMPT", [("--file", args.prompt is not None and args.file is not None)], "give one of them.")
    refuse("--no-chat", [("--system", args.chat is False and args.system is not None)], "it is of a chat.")
    if args.batch is not None:
        others = {"PROMPT": args.prompt, "--file": args.file, "--cache": args.cache, "--image": args.image}
        refuse(
            "--batch", [(name, value is not None) for name, value in others.items()], "it is for one prompt."
        )
    elif args.batch_size is not None:
        raise BadOption("--batch-size is for --batch only; leave it out.")


def _check_cache(cache: str | None, settings: Settings) -> None:
    """Tell before the model works that its cache could not be kept."""
    if cache is None:
        return
    several = settings.num_return_sequences > 1 or settings.num_beams > 1
    refuse("--cache", [("several answers or beams", several)], "it holds the text of one answer.")
    refuse("--cache", [("--prompt-logprobs", settings.prompt_logprobs is not None)], "they need all logits.")
    folder = Path(cache).parent
    if not folder.is_dir():
        raise BadOption(f"--cache {cache} cannot be written: there is no folder {folder}.")


def _answer(stream: Stream, lm: LanguageModel, args: argparse.Namespace, settings: Settings) -> bool:
    """Write the answer; return whether it came to its end."""
    from ortlm.cli import report

    whole = args.json or settings.num_return_sequences > 1
    if not whole and settings.logprobs is None and settings.prompt_logprobs is None:
        return stoppable(lambda: _write(stream), stream.cancel) is not None
    made = stoppable(lambda: stream.generations()[0], stream.cancel)
    if made is None:
        return False
    if args.json:
        say(json.dumps(report.as_json(made, lm), ensure_ascii=False))
    else:
        report.show(made, lm)
    return True


def _write(stream: Stream) -> bool:
    last = "\n"
    for step in stream:
        if step.text:
            write_generated(step.text)
            last = step.text[-1]
    if last != "\n" or sys.stdout.isatty():
        sys.stdout.write("\n")
        sys.stdout.flush()
    return True
