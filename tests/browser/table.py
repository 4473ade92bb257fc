"""Prints how folders for browsers compare with the processor, everywhere that they run here.

    python -m tests.browser.table FOLDER ...             all dtypes in all places; takes packages from npm
    python -m tests.browser.table FOLDER --only wasm     places with that in their names

A row has the greedy tokens that are the processor's own choice, and how far the others' logits are below the
largest one, relative to the largest magnitude: near ties. docs/browser.md has the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ortlm
from ortlm.builder.transformers_js import DTYPES
from tests.browser.environment import MOST_TOKENS, PLACES, TEXTS, Place, Reference, ask, make_case
from tests.runtimes.environments import Unavailable


def main() -> None:
    """Ask for every folder, place by place, and print a row as soon as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", help="what `ortlm build --layout transformers.js` wrote"
    )
    parser.add_argument("--only", default="", help="a part of the names of places, such as wasm or chromium")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="separated by commas")
    parser.add_argument("--steps", type=int, default=32, help="greedy tokens")
    args = parser.parse_args()
    print("| model | runs in | dtype | tokens as on the CPU | largest gap | padding | page |")
    print("|---|---|---|---|---|---|---|")
    for folder in args.folders:
        tokenizer = ortlm.load(folder).tokenizer
        prompts = [tokenizer.encode(text)[:MOST_TOKENS] for text in TEXTS]
        for place in PLACES:
            if args.only in place.name:
                for dtype in args.dtypes.split(","):
                    if (folder / "onnx" / f"model{DTYPES[dtype].suffix}.onnx").is_file():
                        print(row(folder, place, dtype, prompts, args.steps), flush=True)


def row(folder: Path, place: Place, dtype: str, prompts: list[list[int]], steps: int) -> str:
    """Return the row of the table for one graph in one place."""
    library = "onnxruntime-web" if place.name == "node wasm" else "transformers.js"
    start = f"| {folder.name} | {library}, {place.name} | {dtype} |"
    with tempfile.TemporaryDirectory() as models:
        (Path(models) / folder.name).symlink_to(folder.resolve())
        case = make_case(Path(models) / folder.name, library, place, dtype, prompts, steps)
        try:
            found: dict[str, Any] = ask(place.driver, Path(models), [case])[case.name]
        except Unavailable as error:
            return f"{start} {error} | | | |"
    if "error" in found:
        return f"{start} does not run: {json.dumps(found['error'][:160])} | | | |"
    reference = Reference(folder / "onnx" / case.graph)
    gaps = [g for p, tokens in zip(prompts, found["alone"], strict=False) for g in reference.gaps(p, tokens)]
    same = sum(gap == 0 for gap in gaps)
    padding = f"{100 * found['scored']:.2g} %" if "scored" in found else ""
    logged = "no message" if not found.get("logged") else f"{len(found['logged'])} messages"
    page = logged if place.driver == "chromium" else ""
    return f"{start} {same} of {len(gaps)} | {100 * max(gaps):.2g} % | {padding} | {page} |"


if __name__ == "__main__":
    main()
