"""What may be asked of a generation, as flags: shared by the commands that generate."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm._utils.limits import MOST_TEXT_BYTES
from ortlm.cli.machine import device_of
from ortlm.errors import BadOption

if TYPE_CHECKING:
    from ortlm.runtime.language_model import LanguageModel
    from ortlm.runtime.sampling.settings import Settings
    from ortlm.runtime.structured_output.guidance import Guidance

# Flags whose value goes into a field of Settings as it is: (flags, field, type, placeholder, help).
_Flags = tuple[tuple[str, str, type, str, str], ...]
_LENGTH: _Flags = (
    (
        "-n --max-new-tokens --max-tokens",
        "max_new_tokens",
        int,
        "N",
        "at most N new tokens (default: until the context is full)",
    ),
    ("--max-length", "max_length", int, "N", "at most N tokens with the prompt"),
    ("--min-new-tokens --min-tokens", "min_new_tokens", int, "N", "no end before N new tokens"),
    ("--min-length", "min_length", int, "N", "no end before N tokens with the prompt"),
)
_SAMPLING: _Flags = (
    (
        "--temp --temperature",
        "temperature",
        float,
        "T",
        "below 1: more certain, above 1: more random; 0 is greedy",
    ),
    ("--top-k", "top_k", int, "K", "sample from the K most likely tokens; 0 is all"),
    ("--top-p", "top_p", float, "P", "sample from the most likely tokens that reach probability P"),
    ("--min-p", "min_p", float, "P", "only tokens with at least P times the top probability"),
    ("--typical-p", "typical_p", float, "P", "locally typical sampling, up to probability P"),
    ("--seed", "seed", int, "N", "makes sampling repeatable"),
)
_PENALTIES: _Flags = (
    (
        "--repetition-penalty",
        "repetition_penalty",
        float,
        "R",
        "above 1: tokens of prompt and answer become less likely",
    ),
    ("--presence-penalty", "presence_penalty", float, "X", "subtract X from tokens that the answer has"),
    ("--frequency-penalty", "frequency_penalty", float, "X", "subtract X per occurrence in the answer"),
    ("--no-repeat-ngram", "no_repeat_ngram_size", int, "N", "no n-gram of size N occurs twice"),
)
_ANSWERS: _Flags = (("--n", "num_return_sequences", int, "N", "N answers, with sampling or beams"),)
_BEAMS: _Flags = (
    ("--beams", "num_beams", int, "N", "beam search with N beams"),
    ("--length-penalty", "length_penalty", float, "X", "for beams; above 0 favors long answers"),
    ("--beam-groups", "num_beam_groups", int, "N", "diverse beams in N groups"),
    ("--diversity-penalty", "diversity_penalty", float, "X", "penalty for tokens of other groups"),
)
_DRAFTS: _Flags = (("--draft-tokens", "draft_tokens", int, "N", "at most N draft tokens at once"),)
_PLAIN = (*_LENGTH, *_SAMPLING, *_PENALTIES, *_ANSWERS, *_BEAMS, *_DRAFTS)
_EARLY = {"true": True, "false": False, "never": "never"}
# Fields as a user of the command line knows them. Those that are ordinary words stay.
_SPELLED = {field: names.split()[-1] for names, field, *_ in _PLAIN if "_" in field}
_SPELLED |= {
    "do_sample": "--sample",
    "temperature": "--temp",
    "logit_bias": "--logit-bias",
    "bad_words": "--bad-word",
    "stop_token_ids": "--stop-token",
    "suppress_tokens": "--suppress-token",
    "begin_suppress_tokens": "--begin-suppress-token",
    "sequence_bias": "--sequence-bias",
    "prompt_logprobs": "--prompt-logprobs",
}


def add_settings(parser: argparse.ArgumentParser, *, answers: bool = True) -> None:
    """Add the options that say how to generate; ``answers``: also those for several answers and reports."""
    length = parser.add_argument_group("length")
    _add(length, _LENGTH)
    length.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop string, which is left out; may be repeated"
    )
    length.add_argument("--stop-token", action="append", type=int, metavar="ID", help="stop at this token")
    length.add_argument("--ignore-eos", action="store_true", help="continue past the model's own end")
    sampling = parser.add_argument_group(
        "sampling",
        "Greedy unless one of these is given (but for --seed); then the other defaults\n"
        "come from generation_config.json.",
    )
    sampling.add_argument(
        "--sample", action="store_true", help="sample with the values of generation_config.json"
    )
    _add(sampling, _SAMPLING)
    penalties = parser.add_argument_group("penalties and banned tokens")
    _add(penalties, _PENALTIES)
    penalties.add_argument("--logit-bias", action="append", metavar="ID=X", help="add X to a token's logit")
    penalties.add_argument("--bad-word", action="append", metavar="TEXT", help="text that is never generated")
    penalties.add_argument(
        "--suppress-token", action="append", type=int, metavar="ID", help="token that is never generated"
    )
    penalties.add_argument(
        "--begin-suppress-token",
        action="append",
        type=int,
        metavar="ID",
        help="token that never begins an answer",
    )
    penalties.add_argument(
        "--sequence-bias",
        action="append",
        metavar="ID,…=X",
        help="add X to the last token's logit where the others precede it",
    )
    form = parser.add_argument_group("structured output (one of these)").add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", metavar="FILE", help="JSON that follows a schema: a file, or the schema itself"
    )
    form.add_argument("--json-object", action="store_true", help="any JSON object")
    form.add_argument("--regex", metavar="PATTERN", help="text that matches")
    form.add_argument("--grammar", metavar="FILE", help="text of a Lark grammar")
    form.add_argument(
        "--choice", action="append", metavar="TEXT", help="one of several texts; repeat for each"
    )
    search = parser.add_argument_group("beam search, speculative decoding, adapters")
    _add(search, (*_ANSWERS, *_BEAMS) if answers else _BEAMS)
    search.add_argument("--early-stopping", choices=list(_EARLY), help="when beam search stops")
    draft = search.add_mutually_exclusive_group()
    draft.add_argument("--lookup", action="store_true", help="prompt-lookup decoding")
    draft.add_argument("--draft", metavar="DIR", help="draft model: a smaller one with the same tokenizer")
    _add(search, _DRAFTS)
    search.add_argument(
        "--adapter", metavar="NAME", help="LoRA adapter of the model, or NAME=FILE for an .onnx_adapter"
    )
    if answers:
        report = parser.add_argument_group("report")
        for name, what in (("--logprobs", "new tokens"), ("--prompt-logprobs", "the prompt")):
            text = f"log-probabilities of {what}, and of the N most likely"
            report.add_argument(name, type=_count, nargs="?", const=0, metavar="N", help=text)


def _add(group: argparse._ActionsContainer, flags: _Flags) -> None:
    for names, field, kind, placeholder, what in flags:
        group.add_argument(*names.split(), dest=field, type=kind, metavar=placeholder, help=what)


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        # Without a number, the flag takes what stands after it.
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number. If it is the prompt, put it in front of this flag."
        ) from error


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings that ``add_settings`` has read. A draft model comes later, with ``with_model``.

    Raises BadOption for values that cannot be used, and for flags without the one that gives them a meaning.
    """
    from ortlm.runtime.sampling.settings import Settings

    _check(args)
    given = {
        **{field: getattr(args, field, None) for _, field, *_ in _PLAIN},
        "stop": args.stop,
        "stop_token_ids": args.stop_token,
        "bad_words": args.bad_word,
        "suppress_tokens": args.suppress_token,
        "begin_suppress_tokens": args.begin_suppress_token,
        "sequence_bias": dict(map(_sequence_bias, args.sequence_bias)) if args.sequence_bias else None,
        "logprobs": getattr(args, "logprobs", None),
        "prompt_logprobs": getattr(args, "prompt_logprobs", None),
        "do_sample": args.sample or None,
        "ignore_eos": args.ignore_eos or None,
        "logit_bias": dict(map(_bias, args.logit_bias)) if args.logit_bias else None,
        "early_stopping": _EARLY.get(args.early_stopping),
        "draft": "lookup" if args.lookup else None,
        "adapter": _adapter(args.adapter)[0],
        "guidance": _form(args),
    }
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        settings = Settings(**asked)
    except BadOption as error:
        raise BadOption(_in_flags(str(error))) from error
    if settings.num_return_sequences > 1 and settings.num_beams == 1 and not settings.samples:
        raise BadOption(
            f"--n {settings.num_return_sequences}: greedy decoding has one answer only. Add --sample, --temp T or "
            "--beams N."
        )
    return settings


def with_model(settings: Settings, lm: LanguageModel, args: argparse.Namespace) -> Settings:
    """Return ``settings`` with what needs the loaded model: a draft model, a file with an adapter."""
    name, file = _adapter(args.adapter)
    if name is not None and file:
        lm.load_adapter(name, file)
    if not args.draft:
        return settings
    from dataclasses import replace

    from ortlm.runtime.language_model import load

    return replace(settings, draft=load(args.draft, threads=args.threads, **device_of(args)))


def read_file(path: str, flag: str) -> str:
    """Return the text of a file that was named with ``flag``. Raises BadOption if it cannot be read."""
    try:
        return read_limited(path)
    except OSError as error:
        raise BadOption(f"{flag} {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise BadOption(f"{flag} {path!r} cannot be read: {error}") from error


def read_limited(path: str | Path) -> str:
    """Return the UTF-8 text in ``path``, a pipe too, as a shell's <(command) gives one.

    Raises OSError, and BadOption if it is no such text or too long.
    """
    with Path(path).open("rb") as stream:
        raw = stream.read(MOST_TEXT_BYTES + 1)
    if len(raw) > MOST_TEXT_BYTES:
        raise BadOption(f"{path} has more than {MOST_TEXT_BYTES:,} bytes. Give less text at once.")
    try:
        return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise BadOption(f"{path} is no UTF-8 text: {error}.") from error


def read_stdin() -> str:
    """Return the text that comes on stdin. Raises BadOption if it is too long, or no text."""
    try:
        text = sys.stdin.read(MOST_TEXT_BYTES + 1)
    except UnicodeDecodeError as error:
        raise BadOption(f"stdin is no UTF-8 text: {error}.") from error
    if len(text) > MOST_TEXT_BYTES:
        raise BadOption(f"stdin has more than {MOST_TEXT_BYTES:,} characters. Give less text at once.")
    return text


def check_count(flag: str, value: int | None, most: int, *, least: int = 1) -> None:
    """Raise BadOption unless ``value``, if one was given, is from ``least`` to ``most``."""
    if value is not None and not least <= value <= most:
        raise BadOption(f"{flag} must be at least {least:,}, and at most {most:,}; got {value}.")


def refuse(flag: str, others: Sequence[tuple[str, bool]], reason: str) -> None:
    """Raise BadOption if one of the ``others``, each with whether it was given, is there with ``flag``."""
    for other, there in others:
        if there:
            raise BadOption(f"{flag} does not go with {other}: {reason}")


def _check(args: argparse.Namespace) -> None:
    """Refuse what Settings cannot see: flags that would do nothing."""
    beams = (args.num_beams or 1) > 1
    for flag, value in (("--length-penalty", args.length_penalty), ("--early-stopping", args.early_stopping)):
        if value is not None and not beams:
            raise BadOption(f"{flag} is for beam search only; add --beams N, or leave it out.")
    if args.draft_tokens is not None and not (args.lookup or args.draft):
        raise BadOption("--draft-tokens is for drafts only; add --lookup or --draft DIR, or leave it out.")
    drafts = [("--lookup", args.lookup), ("--draft", bool(args.draft))]
    refuse("--beams", drafts if beams else [], "beams have no single next token to propose.")


def _in_flags(message: str) -> str:
    """Return an error of Settings with flags in place of fields."""
    names = "|".join(sorted(_SPELLED, key=len, reverse=True))

    def flag(match: re.Match[str]) -> str:
        return _SPELLED[match[1]] + (" …" if match[2] else "")

    return re.sub(rf"\b({names})\b(=…)?", flag, message)


def _adapter(given: str | None) -> tuple[str | None, str]:
    """Return the name and, if one was given, the file."""
    if given is None:
        return None, ""
    name, equals, file = given.partition("=")
    if not name or (equals and not file):
        raise BadOption(f"--adapter takes NAME or NAME=FILE; found {given!r}.")
    return name, file


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise BadOption(f"--logit-bias takes ID=X, such as 42=-3.5; found {text!r}.") from error


def _sequence_bias(text: str) -> tuple[tuple[int, ...], float]:
    tokens, _, bias = text.partition("=")
    try:
        return tuple(int(token) for token in tokens.split(",")), float(bias)
    except ValueError as error:
        raise BadOption(f"--sequence-bias takes ID,…=X, such as 42,7=-3.5; found {text!r}.") from error


def _form(args: argparse.Namespace) -> Guidance | None:
    if args.json_object:
        return _guidance().json_object()
    if args.regex is not None:
        return _guidance().regex(args.regex)
    if args.choice:
        return _guidance().choices(args.choice)
    if args.grammar is not None:
        return _guidance().lark(read_file(args.grammar, "--grammar"))
    if args.json_schema is None:
        return None
    itself = args.json_schema.lstrip().startswith(("{", "["))
    return _guidance().json_schema(
        args.json_schema if itself else read_file(args.json_schema, "--json-schema")
    )


def _guidance() -> type[Guidance]:
    from ortlm.runtime.structured_output.guidance import Guidance

    return Guidance
