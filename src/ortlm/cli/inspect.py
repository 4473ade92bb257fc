"""``ortlm inspect``: what a built model is and what it costs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_EXAMPLES = """\
examples:
  ortlm inspect phi
  ortlm inspect phi --json | jq .cache_bytes_per_token
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a built model is and what it costs",
        description="Show a built model's graphs, sizes, context, cache and origin.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show."""
    found = describe(args.model)
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    elif sys.stdout.isatty():
        _show_table(found)
    else:
        for key, value in _rows(found):
            print(f"{key}: {value}")
    return 0


def describe(model: str) -> dict[str, Any]:
    """Return everything known of the model folder ``model``; sizes in bytes."""
    from ortlm.artifact import open_artifact

    artifact = open_artifact(model)
    manifest = artifact.manifest
    files = sorted(path for path in artifact.path.rglob("*") if path.is_file())
    sizes = {path.relative_to(artifact.path).as_posix(): path.stat().st_size for path in files}
    return {
        "path": str(artifact.path),
        "context_tokens": manifest.context_tokens,
        "vocab_size": manifest.vocab_size,
        "stop_token_ids": list(manifest.stop_token_ids),
        "rope_switch_tokens": manifest.rope_switch_tokens,
        "graphs": {
            name: {
                "file": graph.file,
                "inputs": list(graph.inputs.values()),
                "optional_inputs": list(graph.optional.values()),
                "states": len(graph.states),
                "state_kinds": sorted({state.kind for state in graph.states}),
            }
            for name, graph in manifest.graphs.items()
        },
        "cache_bytes_per_token": _cache_bytes_per_token(artifact.path, manifest.info),
        "generation": dict(manifest.generation),
        "total_bytes": sum(sizes.values()),
        "file_bytes": sizes,
        "info": dict(manifest.info),
    }


def _cache_bytes_per_token(path: Path, info: Mapping[str, Any]) -> int:
    known = info.get("cache_bytes_per_token")
    if isinstance(known, int):
        return known
    # Only the graph knows then, so it has to be loaded.
    from ortlm.runtime.generate import load

    return load(path).cache_bytes_per_token


def _rows(found: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and text of every value, nested names joined by dots."""
    for key, value in found.items():
        name = f"{at}{key}"
        if name == "info.files":
            continue  # hashes are for programs; the sizes are shown already
        if isinstance(value, Mapping):
            yield from _rows(value, f"{name}.")
        elif value is None or value == []:
            continue
        elif isinstance(value, list):
            yield name, ", ".join(str(entry) for entry in value)
        elif isinstance(value, int) and not isinstance(value, bool) and _is_size(name):
            yield name.replace("_bytes", ""), _size(value)
        else:
            yield name, str(value)


def _is_size(name: str) -> bool:
    return "_bytes" in name


def _size(count: int) -> str:
    """Return ``count`` bytes for people, in powers of 1000 as disks are sold."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _show_table(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(found):
        # Text, so that brackets in a value are not taken for markup.
        table.add_row(key, Text(value))
    Console().print(table)
