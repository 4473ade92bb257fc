"""The prompt of a command: where it stands, and the messages that flags make of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ortlm.cli.settings import read_file, read_stdin
from ortlm.errors import BadOption

# What a message says: a text, or parts that are texts and images.
Content = str | list[dict[str, Any]]


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt that was given, that stands in a file, or in stdin."""
    if args.file is not None:
        return read_file(args.file, "--file").removesuffix("\n")
    given: str | None = args.prompt
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise BadOption("PROMPT is missing. Give a text, or pipe one in.")
    return read_stdin().removesuffix("\n")


def prompt_of(text: str, args: argparse.Namespace) -> str | list[dict[str, Any]]:
    """Return ``text``, or the messages that it makes with --chat, --system and --image."""
    shown = bool(args.image) and args.chat is not False
    if not (args.chat or shown or args.system is not None):
        return text
    head = [{"role": "system", "content": args.system}] if args.system else []
    return [*head, {"role": "user", "content": content_of(text, args.image if shown else ())}]


def content_of(text: str, images: Sequence[str] | None) -> Content:
    """Return a message's content: ``text``, after ``images`` if there are some."""
    if not images:
        return text
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
