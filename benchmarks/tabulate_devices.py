"""Write what benchmarks/check_device.py found, one JSON file for each device, into docs/devices.md.

    python benchmarks/check_device.py cuda --json benchmarks/results/check_device-h200.json
    python benchmarks/tabulate_devices.py

A device that has no file in benchmarks/results has not been run, and the page says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "devices.md"
BEGIN, END = "<!-- results: begin, written by benchmarks/tabulate_devices.py -->", "<!-- results: end -->"
# Targets with devices of their own. What "cpu" and "mobile" build runs in every run of the tests.
TARGETS = {"cuda": "NVIDIA GPUs", "webgpu": "WebGPU", "dml": "DirectML"}

PARITY = """\
Logits of tiny random models: relative error after a prefill of 24 tokens and after 8 further steps, and how many
of 40 greedy tokens are equal before the first near tie that falls the other way. fp16 and bf16 are compared with
transformers in fp32; int4 and int8 with the same folder on the CPU, since rounding weights moves random models
far from their checkpoints. Ragged batches, reordered rows, rewinding, restored prompt caches and a cache that
grows are compared with single runs on the device: the last number is the largest error among them.
"""
SPEED = """\
Phi-3.5-mini's shape (3.8 B parameters, int4, random weights), prefill of 512 tokens for each row, 128 decoded;
medians; ratio to onnxruntime-genai on the same folder in the same run.
"""


def main() -> int:
    """Write the page's section."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def page(text: str) -> str:
    """Return ``text``, the page, with the section made again from the results."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section(read())}\n{END}{after}"


def read() -> list[dict[str, Any]]:
    """Return the results, in the order of their files' names."""
    files = sorted(RESULTS.glob("check_device-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the section in Markdown."""
    parts = []
    run = {result["device"].partition(":")[0] for result in results}
    for result in results:
        parts += [heading(result), parity(result["parity"])]
        if result.get("speed"):
            parts.append(speed(result["speed"]))
    missing = [f"`{name}` ({title})" for name, title in TARGETS.items() if name not in run]
    if missing:
        parts.append(
            f"No results of this script: {', '.join(missing)}. What is said of these above and in\n"
            "[Compatibility](compatibility.md) is all that was run; the rest is checked by graph only.\n"
        )
    return "\n".join(parts)


def heading(result: Mapping[str, Any]) -> str:
    """Return the heading of one device."""
    machine = result["machine"]
    gpu = (machine.get("gpu") or machine["system"]).split(",")[0]
    found = f"### `{result['device']}`: {gpu}, ONNX Runtime {machine['onnxruntime']}\n"
    return found + f"\nPython {machine['python']}, numpy {machine['numpy']}.\n"


def parity(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what ten families of tiny random models compute."""
    lines = [
        PARITY,
        "| family | precision | against | prefill | 8 steps | greedy of 40 | among themselves |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"| `{row['family']}` | {row['precision']} "
        if row.get("error"):
            lines.append(f"{name}| | failed: {row['error']} | | | |")
            continue
        rounded = row["precision"].startswith("int") and row.get("cpu_prefill") is not None
        prefix = "cpu_" if rounded else ""
        own = max(row[key] for key in ("ragged", "reordered", "rewind", "restored", "grown"))
        errors = f"{row[prefix + 'prefill']:.1e} | {row[prefix + 'further']:.1e}"
        figures = f"{errors} | {row[prefix + 'greedy']} | {own:.1e}"
        lines.append(f"{name}| {'CPU' if rounded else 'transformers'} | {figures} |")
    return "\n".join(lines) + "\n"


def speed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of speeds, each next to onnxruntime-genai's on the same folder."""
    lines = [
        SPEED,
        "| batch | prefill, tokens/s | ratio | decode, tokens/s | ratio | first token | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch in sorted({row["batch"] for row in rows if "batch" in row}):
        engines = {row["engine"]: row for row in rows if row.get("batch") == batch and not row.get("error")}
        if "ortlm" not in engines:
            continue
        ours, theirs = engines["ortlm"], engines.get("genai")

        def ratio(key: str, ours: Mapping[str, Any] = ours, theirs: Mapping[str, Any] | None = theirs) -> str:
            return f"{ours[key] / theirs[key]:.2f}" if theirs else "-"

        lines.append(
            f"| {batch} | {ours['prefill_tps']:,.0f} | {ratio('prefill_tps')} | {ours['decode_tps']:,.0f} | "
            f"{ratio('decode_tps')} | {ours['first_token_ms']} ms | {ours['memory_mib'] / 1024:.1f} GiB |"
        )
    loads = [row for row in rows if "load_s" in row]
    lines.append("")
    lines.append("Loading: " + ", ".join(f"{row['engine']} {row['load_s']} s" for row in loads) + ".")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
