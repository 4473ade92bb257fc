"""``ortlm generate --batch``: many prompts, a line of JSON each, to as many lines of JSON."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ortlm._utils.checked_json import loads, shown
from ortlm._utils.limits import MOST_ROWS
from ortlm.cli.machine import device_of
from ortlm.cli.output import say, tell
from ortlm.cli.prompts import prompt_of
from ortlm.cli.report import answer
from ortlm.cli.settings import check_count, read_file, read_stdin, with_model
from ortlm.errors import BadOption, ContextFull, Error

if TYPE_CHECKING:
    from ortlm.runtime.generation.stream import Generation
    from ortlm.runtime.language_model import LanguageModel
    from ortlm.runtime.sampling.settings import Settings

_SIZE = 8
# So many times as many prompts as run at once are submitted before the first of them is answered.
_AHEAD = 32


def run_batch(args: argparse.Namespace, settings: Settings) -> int:
    """Answer the prompts of ``args.batch``, and write each answer as soon as it and those before it are there."""
    size = _SIZE if args.batch_size is None else args.batch_size
    check_count("--batch-size", size, MOST_ROWS)
    lines = _read(args.batch)
    if not lines:
        raise BadOption(f"--batch {args.batch} holds no prompt. Write one on each line, as JSON.")
    from ortlm.runtime.language_model import load

    lm = load(args.model, threads=args.threads, **device_of(args))
    settings = with_model(settings, lm, args)
    # All at once, so that a prompt that cannot be used is told before hours of work.
    prompts = [_encode(number, value, lm, args) for number, value in lines]
    if _is_one_row(settings, lm):
        _run_engine(prompts, settings, lm, size, verbose=args.verbose)
        return 0
    for at in range(0, len(prompts), size):
        group = prompts[at : at + size]
        if lm.vision_encoder is not None:
            # Features of many images would not fit into memory; of those that were forgotten they come again.
            group = [_encode(number, value, lm, args) for number, value in lines[at : at + size]]
        for ids, made in zip(group, lm.generate_batch(group, settings=settings), strict=True):
            _write(ids, made, lm)
        if args.verbose:
            tell(f"{at + len(group)} of {len(prompts)} prompts answered")
    return 0


def _is_one_row(settings: Settings, lm: LanguageModel) -> bool:
    """Whether each prompt is a row of its own in main memory, which can begin when another one ends."""
    several = settings.num_beams > 1 or settings.num_return_sequences > 1
    drafts = settings.draft is not None or isinstance(settings.seed, tuple)
    # Features of all images at once would not fit into memory.
    return not (several or drafts or lm.vision_encoder is not None) and lm.session.memory.is_host


def _run_engine(
    prompts: Sequence[Sequence[int]], settings: Settings, lm: LanguageModel, size: int, *, verbose: bool
) -> None:
    """Answer ``prompts``, ``size`` at once: when one has ended, the next takes its place."""
    from ortlm.serving.engine import Engine, EngineOptions
    from ortlm.serving.request import Request

    # Tokens of answers round in another way than prompts: answers must not depend on the order.
    options = EngineOptions(batch=size, queue=_AHEAD * size, reuse_answers=False)
    with Engine(lm, options) as engine:
        seed, requests = settings.seed, deque[Request]()
        for at in range(len(prompts) + 1):
            # Answers are written in order, so that those that wait for an earlier one are kept.
            while requests and (at == len(prompts) or len(requests) >= _AHEAD * size):
                number = at - len(requests)
                _write(prompts[number], requests.popleft().result(), lm)
                if verbose and ((number + 1) % size == 0 or number + 1 == len(prompts)):
                    tell(f"{number + 1} of {len(prompts)} prompts answered")
            if at < len(prompts):
                own = replace(settings, seed=seed + at) if isinstance(seed, int) else settings
                requests.append(engine.submit(prompts[at], own))


def _write(ids: Sequence[int], made: Generation, lm: LanguageModel) -> None:
    usage = {"prompt_tokens": len(ids), "completion_tokens": _count(made)}
    say(json.dumps({**answer(made, lm), "usage": usage}, ensure_ascii=False))


def _read(path: str) -> list[tuple[int, str | list[Any]]]:
    """Return the prompts with their line numbers; empty lines are passed over."""
    text = read_stdin() if path == "-" else read_file(path, "--batch")
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = loads(line)
        except ValueError as error:
            raise BadOption(f"line {number} of --batch {path} is no JSON: {error}.") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, (str, list)):
            raise BadOption(
                f"line {number} of --batch {path} must be a text or an object with prompt, such as "
                f'{{"prompt": "Hello"}}; found {shown(prompt)}'
            )
        prompts.append((number, prompt))
    return prompts


def _encode(
    number: int, prompt: str | list[Any], lm: LanguageModel, args: argparse.Namespace
) -> Sequence[int]:
    """Return a prompt's token ids; a list is messages or token ids already."""
    try:
        given = prompt_of(prompt, args) if isinstance(prompt, str) else prompt
        ids = lm.encode(given, num_crops=args.num_crops)
    except Error as error:
        raise type(error)(f"line {number} of --batch {args.batch}: {error}") from error
    context = lm.manifest.context_tokens
    if len(ids) > context:
        where = f"line {number} of --batch {args.batch}"
        raise ContextFull(f"{where} has {len(ids)} tokens, but the model's context holds {context}.")
    return ids


def _count(made: Generation) -> int:
    return sum(len(one.token_ids) for one in (made, *made.alternatives))
