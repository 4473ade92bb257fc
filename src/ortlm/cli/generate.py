"""``ortlm generate``: continue a prompt."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ortlm.errors import BadOption

if TYPE_CHECKING:
    from ortlm.runtime.generate import LanguageModel, Timings
    from ortlm.runtime.settings import Settings

_EXAMPLES = """\
examples:
  ortlm generate phi "The capital of France is" -n 32
  ortlm generate phi --chat "Write a haiku." --temp 0.8 --seed 1
  cat letter.txt | ortlm generate phi --chat --system "Summarize." -
  ortlm generate phi "1, 2, 3," --stop 9 --json | jq .tokens
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
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
    what.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="put the prompt into the model's chat format as a user's message (default: continue it as is)",
    )
    what.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    add_settings(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="write one JSON object instead of the text")
    output.add_argument("-v", "--verbose", action="store_true", help="write speeds to stderr at the end")
    add_machine(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to generate."""
    length = parser.add_argument_group("length")
    length.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        metavar="N",
        help="at most N new tokens (default: until the context is full)",
    )
    length.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again"
    )
    length.add_argument("--ignore-eos", action="store_true", help="go on past the model's own end")
    sampling = parser.add_argument_group(
        "sampling",
        "Greedy unless --temp, --top-k, --top-p or --sample is given; then the publisher's values fill in.",
    )
    sampling.add_argument("--sample", action="store_true", help="sample with the publisher's values")
    sampling.add_argument(
        "--temp",
        "--temperature",
        type=float,
        metavar="T",
        help="below 1 is sharper, above 1 wilder, 0 is greedy",
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="among the K likeliest tokens; 0 is all")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="among the likeliest that reach probability P"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids repetition")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where to compute."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", type=int, metavar="N", help="threads (default: physical cores)")
    machine.add_argument(
        "--provider", action="append", metavar="NAME", help="execution provider, such as cuda (default: cpu)"
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings that ``add_settings`` has read."""
    from ortlm.runtime.settings import Settings

    return Settings(
        max_new_tokens=args.max_tokens,
        do_sample=True if args.sample else None,
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )


def run(args: argparse.Namespace) -> int:
    """Generate."""
    settings = settings_of(args)
    text = read_prompt(args.prompt)
    from ortlm.runtime.generate import Timings, load

    lm = load(args.model, threads=args.threads, providers=args.provider)
    prompt = _messages(text, args.system) if args.chat or args.system else text
    if args.json:
        made = lm.generate(prompt, settings=settings)
        found = {
            "text": made.text,
            "tokens": made.token_ids,
            "finish_reason": made.finish_reason,
            "timings": made.timings.to_dict(),
        }
        print(json.dumps(found, ensure_ascii=False))
        timings = made.timings
    else:
        timings = Timings()
        _write(lm, prompt, settings, timings)
    if args.verbose:
        print(summary(timings), file=sys.stderr)
    return 0


def read_prompt(given: str | None) -> str:
    """Return the prompt that was given, or that stands in stdin."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise BadOption("PROMPT is missing. Give a text, or pipe one in.")
    return sys.stdin.read().removesuffix("\n")


def summary(timings: Timings) -> str:
    """Return one line about speed."""
    fresh = timings.prompt_tokens - timings.cached_tokens
    rate = fresh / timings.prompt_seconds if timings.prompt_seconds else 0.0
    return (
        f"prompt: {timings.prompt_tokens} tokens ({timings.cached_tokens} from the cache), "
        f"{timings.prompt_seconds:.2f} s, {rate:.1f} tokens/s; "
        f"answer: {timings.new_tokens} tokens, {timings.decode_seconds:.2f} s, "
        f"{timings.tokens_per_second:.1f} tokens/s"
    )


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


def _write(
    lm: LanguageModel, prompt: str | list[dict[str, str]], settings: Settings, timings: Timings
) -> None:
    last = "\n"
    for step in lm.stream(prompt, settings=settings, timings=timings):
        if step.text:
            sys.stdout.write(step.text)
            sys.stdout.flush()
            last = step.text[-1]
    if last != "\n" or sys.stdout.isatty():
        sys.stdout.write("\n")
