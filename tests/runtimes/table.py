"""Writes docs/compatibility.md: what every runtime generates from every kind of folder, as it was run.

python -m tests.runtimes.table
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ortlm._version import __version__
from ortlm.target import TARGETS
from tests.runtimes.environments import NEWEST, ROOT, RUNTIMES, Runtime, Unavailable, apart, ask, prepare
from tests.runtimes.models import GROUPS, MODELS, STEPS, Model, make_cases

OUT = ROOT / "docs" / "compatibility.md"
NOT_RUN = "not run"
SYSTEM, PYTHON = f"{platform.system()} {platform.machine()}", platform.python_version()

HEAD = f"""# What runs where

Written by `python -m tests.runtimes.table` on {SYSTEM}, Python {PYTHON};
`make test-runtimes` checks the same. Every folder is built once, by ortlm {__version__}, and loaded in an
environment of each runtime; every model then generates {STEPS} greedy tokens after a short prompt. They are
compared with those of {NEWEST.name} through ortlm.

| cell | means |
|---|---|
| `=` | loads, and all {STEPS} tokens are equal |
| `12, 1.3 %` | loads, and the first 12 tokens are equal; the logits of the prompt differ by 1.3 % of the largest |
| `needs 1.28` | refused with that reason: the manifest says which ONNX Runtime the graph needs |
| `fails` | does not load, or does not run |
| `{NOT_RUN}` | the runtime does not support it, or could not be installed |

With integer weights, `accuracy_level` 4 (the default of `cpu`, `mobile` and `webgpu`) quantizes activations to
8 bits, and kernels round them differently. In models with random weights the most likely tokens have nearly equal
logits, so that this changes tokens. The same weights with `accuracy_level=1` give equal tokens everywhere.

A column of onnxruntime is two runs: `model.onnx` in a plain loop, and the folder through ortlm, which uses
`model_ragged.onnx` from 1.32 on. Both must agree, and so must a batch of rows of different lengths with each row
alone.
"""
GRAPH_ONLY = """\
The model that ships with the project, with `--recipe fast`. Rows of `cuda`, `dml` and `webgpu` show the
**graph only**: it ran on the CPU provider, not on such a device. That provider has no kernels for bf16.
"""
BY_HAND = """\
## Not run

Not run at all: any GPU or NPU, DirectML, ARM, Windows, macOS. Folders for browsers are made differently, and
[their page](browser.md) says what runs them. Run once by hand, not by the script: the folders for `webgpu` on the
WebGPU provider with a software adapter without `shader-f16` (onnxruntime-ep-webgpu 0.4.0 with onnxruntime 1.31.1
and SwiftShader), compared with the CPU provider.

| folder | |
|---|---|
| webgpu int4, use_webgpu_fp32 | all 32 tokens equal, logits within 1.3 % |
| webgpu int8, use_webgpu_fp32 | the first 8 of 32 tokens equal, a later one differs; logits within 1.5 % |
| webgpu fp32 | 12 of 12 tokens equal, logits within 0.0001 % |
| webgpu int4 | does not run: it requires `shader-f16`, which the adapter does not have |
"""


def answers(folder: Path) -> dict[Runtime, dict[str, Any]]:
    """Return what each runtime that can be had says."""
    cases = make_cases((m for m in MODELS if m.precision != "bf16"), folder)
    found = {}
    for runtime in RUNTIMES:
        try:
            prepare(runtime)
            found[runtime] = ask(runtime, cases)
            print(f"{runtime.name}: ran {found[runtime]['version']}", file=sys.stderr)
        except Unavailable as reason:
            print(reason, file=sys.stderr)
    return found


def cell(model: Model, runtime: Runtime, found: dict[Runtime, dict[str, Any]]) -> str:
    """Return what ``runtime`` made of ``model``."""
    if runtime not in found:
        return NOT_RUN
    want = found[NEWEST]["cases"].get(model.name, {}).get("ortlm")
    got = found[runtime]["cases"].get(model.name, {})
    runs = [run for run in (got, got.get("ortlm", {})) if "tokens" in run or "error" in run]
    if not runs or want is None:
        return NOT_RUN
    if runtime.onnxruntime < model.needs:
        refused = "error" in got.get("ortlm", {"error": ""})
        return f"needs {model.needs[0]}.{model.needs[1]}" if refused else "runs, and should not"
    return min((_compared(run, want) for run in runs), key=lambda text: (text == "=", text))


def _compared(run: dict[str, Any], want: dict[str, Any]) -> str:
    if "error" in run:
        return "fails"
    if run["tokens"] == want["tokens"]:
        return "="
    same = next(i for i, (a, b) in enumerate(zip(run["tokens"], want["tokens"], strict=True)) if a != b)
    return f"{same}, {apart(run['logits'], want['logits']):.1%}".replace("%", " %")


def table(rows: Iterable[tuple[str, Model]], found: dict[Runtime, dict[str, Any]]) -> str:
    """Return a table with a column for each runtime."""
    short = [runtime.name.replace("onnxruntime", "ort") for runtime in RUNTIMES]
    lines = [f"| | {' | '.join(short)} |", f"|---|{'---|' * len(short)}"]
    for name, model in rows:
        cells = [NOT_RUN if model.precision == "bf16" else cell(model, r, found) for r in RUNTIMES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document(found: dict[Runtime, dict[str, Any]]) -> str:
    """Return the whole text."""
    versions = "\n".join(
        f"- {runtime.name}: {' '.join(runtime.packages)}"
        + (f" (ran as {found[runtime]['version']})" if runtime in found else " (not run)")
        for runtime in RUNTIMES
    )
    parts = [
        HEAD,
        "## Targets and precisions\n",
        GRAPH_ONLY,
        table(_named(GROUPS["targets"]), found),
        "\n## Options\n",
        table(_named(GROUPS["variations"]), found),
        "\n## Families\n",
        "Tiny models with random weights, for `cpu`.\n",
        table(_named(GROUPS["families"]), found),
        "\n## Multimodal (vision) models\n",
        "Through ortlm, with an image in the prompt.\n",
        table(_named(GROUPS["vision"]), found),
        "\n## Runtimes\n",
        versions,
        f"\n{BY_HAND}",
    ]
    return "\n".join(parts)


def _named(models: Sequence[Model]) -> list[tuple[str, Model]]:
    only = {"cuda", "dml", "webgpu"} & set(TARGETS)
    return [(m.name + (" (graph only)" if m.target in only else ""), m) for m in models]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        OUT.write_text(document(answers(Path(place))), encoding="utf-8")
