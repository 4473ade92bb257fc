"""``ortlm devices``: what this machine can run models on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ortlm._utils.formatting import readable_bytes
from ortlm.cli import Subparsers
from ortlm.cli.output import console, say

if TYPE_CHECKING:
    from ortlm.runtime.engine.device_list import Listed

_EXAMPLES = """\
examples:
  ortlm devices
  ortlm devices --json | jq -r '.devices[] | select(.ready).name'
  ortlm generate phi "The capital of France is" --device cuda:1
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "devices",
        help="list what this machine can run models on",
        description="List the devices that models can run on here, and what others need.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def run(args: argparse.Namespace) -> int:
    """List."""
    from dataclasses import asdict

    from ortlm.runtime.engine.device_list import list_devices
    from ortlm.runtime.engine.devices import onnxruntime_version

    devices = list_devices()
    if args.json:
        report = {"onnxruntime": onnxruntime_version(), "devices": [asdict(device) for device in devices]}
        say(json.dumps(report, ensure_ascii=False, indent=1))
    elif sys.stdout.isatty():
        _show_table(devices)
    else:
        for device in devices:
            say("\t".join(_cells(device)))
    return 0


def _cells(device: Listed) -> Iterator[str]:
    """Return what is known of a device: name, what it is, provider, version, memory, state."""
    yield device.name
    yield device.what + (f" [{' '.join(device.instructions)}]" if device.instructions else "")
    yield device.provider
    yield device.version or "-"
    yield "-" if device.memory_bytes is None else readable_bytes(device.memory_bytes)
    if device.ready:
        yield "ready"
    elif device.install is not None:
        yield f"not installed: pip install '{device.install}'"
    else:
        yield str(device.missing)


def _show_table(devices: Sequence[Listed]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("device", "what it is", "provider", "memory", "state"):
        table.add_column(name, overflow="fold", no_wrap=name in ("device", "memory"))
    for device in devices:
        name, what, provider, version, memory, state = _cells(device)
        row = (name, what, provider if version == "-" else f"{provider} {version}", memory, state)
        # Text, so that brackets are not taken for markup.
        table.add_row(*map(Text, row))
    console().print(table)
