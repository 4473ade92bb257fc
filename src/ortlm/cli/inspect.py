"""``ortlm inspect``: what a built model is and what it needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import Field, integer, is_integer, number, text
from ortlm._utils.formatting import readable_bytes, readable_count
from ortlm.cli import Subparsers
from ortlm.cli.output import console, say

_text = text(longest=100_000)
_INFO: Mapping[str, Field] = {
    **dict.fromkeys(("layers", "parameters", "cache_bytes_per_token"), integer()),
    **dict.fromkeys(("model_type", "recipe", "kv_cache", "activations", "precision", "target"), _text),
    **dict.fromkeys(("merged_adapter", "source", "revision", "built_with"), _text),
    "bits_per_weight": number(0, 1_000),
    "checkpoint_bytes": integer(1),
}

_EXAMPLES = """\
examples:
  ortlm inspect phi
  ortlm inspect phi --json | jq .cache_bytes_per_token
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a built model is and what it needs",
        description="Show a built model's graphs, sizes, context, cache and origin.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a built model")
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show."""
    facts = describe(args.model)
    if args.json:
        say(json.dumps(facts, ensure_ascii=False, indent=1))
    elif sys.stdout.isatty():
        _show_table(facts)
    else:
        for key, value in _rows(facts):
            say(f"{key}: {value}".replace("\n", "; "))
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
                "onnxruntime": graph.onnxruntime,
                "inputs": list(graph.inputs.values()),
                "optional_inputs": list(graph.optional.values()),
                "states": len(graph.states),
                "state_kinds": sorted({state.kind for state in graph.states}),
                "window_states": sum(state.kind == "window" for state in graph.states),
                "window_tokens": max((state.window or 0 for state in graph.states), default=0) or None,
                "variants": [
                    {
                        "file": variant.file,
                        "onnxruntime": variant.onnxruntime,
                        "providers": list(variant.providers),
                        "optional_inputs": list(variant.optional.values()),
                    }
                    for variant in graph.variants
                ],
            }
            for name, graph in manifest.graphs.items()
        },
        "adapters": dict(manifest.adapters),
        "cache_bytes_per_token": _cache_bytes_per_token(artifact.path, manifest.info),
        "generation": dict(manifest.generation),
        "total_bytes": sum(sizes.values()),
        "file_bytes": sizes,
        "info": dict(manifest.info),
    }


def _cache_bytes_per_token(path: Path, info: Mapping[str, Any]) -> int:
    known = _of_known_kinds(info).get("cache_bytes_per_token")
    if is_integer(known):
        return known
    # Only the graph knows then, so it has to be loaded.
    from ortlm.runtime.language_model import load

    return load(path).cache_bytes_per_token


def _of_known_kinds(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the manifest says for people, without values of a kind that it does not have."""
    return {key: value for key, value in info.items() if key in _INFO and _INFO[key].good(value)}


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of what people want to know first; ``--json`` has everything."""
    info = _of_known_kinds(facts["info"])
    yield "path", str(facts["path"])
    if info.get("model_type"):
        layers = f", {info['layers']} layers" if "layers" in info else ""
        count = f", {readable_count(info['parameters'])} parameters" if "parameters" in info else ""
        yield "architecture", f"{info['model_type']}{layers}{count}"
    if "recipe" in info:
        precision, target, activations = (
            info.get(key, "unknown") for key in ("precision", "target", "activations")
        )
        cache = info.get("kv_cache", activations)
        yield "target", f"{precision} for {target}, {activations} activations, {cache} KV cache"
        yield "weights", "\n".join(info["recipe"].split("; "))
        if "bits_per_weight" in info:
            yield "bits per weight", f"{info['bits_per_weight']:.2f}"
    if "checkpoint_bytes" in info:
        before = info["checkpoint_bytes"]
        share = f"{facts['total_bytes'] / before:.0%} of the checkpoint's {readable_bytes(before)}"
        yield "size", f"{readable_bytes(facts['total_bytes'])}, {share}"
    else:
        yield "size", readable_bytes(facts["total_bytes"])
    switch = facts["rope_switch_tokens"]
    switched = f", longrope short/long switch after {switch:,}" if switch else ""
    yield "context", f"{facts['context_tokens']:,} tokens{switched}"
    bounded = "".join(
        f"; {graph['window_states']} of {graph['states']} tensors keep little more than the last "
        f"{graph['window_tokens']:,} tokens"
        for graph in facts["graphs"].values()
        if graph["window_states"]
    )
    yield "KV cache", f"{readable_bytes(facts['cache_bytes_per_token'])} per token{bounded}"
    yield "vocabulary", f"{facts['vocab_size']:,} tokens; stop tokens {facts['stop_token_ids']}"
    if facts["generation"]:
        yield "defaults", ", ".join(f"{key} {value}" for key, value in facts["generation"].items())
    for name, graph in facts["graphs"].items():
        names = ", ".join([*graph["inputs"], *(f"[{name}]" for name in graph["optional_inputs"])])
        since = f", ONNX Runtime {graph['onnxruntime']} and later" if graph["onnxruntime"] else ""
        yield f"{name} graph", f"{graph['file']}: {names}, {graph['states']} cache tensors{since}"
        for variant in graph["variants"]:
            more = ", ".join(f"[{name}]" for name in variant["optional_inputs"])
            where = (
                f"ONNX Runtime {variant['onnxruntime']} and later with {' or '.join(variant['providers'])}"
            )
            yield f"{name} variant", f"{variant['file']}: {more}, {where}"
    for name, file in facts["adapters"].items():
        yield f"adapter {name}", file
    if info.get("merged_adapter"):
        yield "merged adapter", str(info["merged_adapter"])
    if "source" in info:
        revision = f" at {info['revision']}" if info.get("revision") else ""
        yield "built from", f"{info['source']}{revision}, by {info.get('built_with', 'an unknown builder')}"
    for name, size in facts["file_bytes"].items():
        yield f"  {name}", readable_bytes(size)


def _show_table(facts: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(facts):
        # Text, so that brackets in a value are not taken for markup.
        table.add_row(key, Text(value))
    console().print(table)
