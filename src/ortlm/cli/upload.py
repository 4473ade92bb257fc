"""``ortlm upload``: a built model to the Hugging Face hub."""

from __future__ import annotations

import argparse
import json

from ortlm._utils.formatting import readable_bytes
from ortlm.cli import DONE, Subparsers
from ortlm.cli.output import say, tell

_EXAMPLES = """\
examples:
  ortlm upload phi user/phi-int4
  ortlm upload phi user/phi-int4 --dry-run
  ortlm upload phi user/phi-int4 --public
  ortlm generate user/phi-int4 "The capital of France is"
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "upload",
        help="upload a built model to the Hugging Face hub",
        description="Upload a built model to the Hugging Face hub, with a model card: base model,\n"
        "license, tags and measured quality, and nothing of this machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument("name", metavar="USER/NAME", help="what it is called on the hub")
    parser.add_argument(
        "--public", action="store_true", help="let everybody read it (default: a private repository)"
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="the hub's name of the model that it was made of, if it was built from a folder",
    )
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Upload."""
    from ortlm.artifact.upload import prepare_upload, upload

    what = prepare_upload(args.model, args.name, base_model=args.base_model)
    if what.license is None:
        tell(f"note: the model card states no license. Find the base model's before you share {args.name}.")
    if what.left:
        tell(f"note: not uploaded, because the build did not write it: {', '.join(what.left)}.")
    facts = {
        "schema": 1,
        "name": what.name,
        "private": not args.public,
        "files": list(what.files),
        "bytes": what.bytes,
        "license": what.license,
        "base_model": what.base_model,
    }
    if args.dry_run:
        facts["dry_run"] = True
        done = "would upload"
    else:
        facts["commit"] = upload(what, public=args.public, message=args.message)
        done = "uploaded"
    if args.json:
        say(json.dumps(facts, indent=2))
        return DONE
    kind = "public" if args.public else "private"
    say(f"{done} {len(what.files)} files, {readable_bytes(what.bytes)}, to {what.name} ({kind})")
    if args.dry_run:
        for name in what.files:
            say(f"  {name}")
    else:
        say(f'Run it: ortlm generate {what.name} "Once upon a time"')
    return DONE
