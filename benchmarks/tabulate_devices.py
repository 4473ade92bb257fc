"""Write what check_device.py and check_arm64.py found, one JSON file for each device, into docs/devices.md.

    python benchmarks/check_device.py cuda --json benchmarks/results/check_device-h200.json
    python benchmarks/check_arm64.py --json benchmarks/results/check_arm64-qemu.json
    python -m tests.docs.device_support
    python benchmarks/tabulate_devices.py

What tests run and what builds refuse is read from tests and code. A device that has no file in benchmarks/results
has not been run, and the page says so.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ortlm.target import TARGETS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "devices.md"
BEGIN, END = "<!-- results: begin, written by benchmarks/tabulate_devices.py -->", "<!-- results: end -->"
MATRIX = """\
What each target builds, and where that was run; the families are in the tables below. "By graph only" means that
no device has run them: tests build such folders, check their graphs, and run them on the CPU. "Refused" counts
families of the tests that a build for the target refuses, or whose context it cuts.

| target | precision | run by these scripts | run by `make test` | refused |
|---|---|---|---|---|
"""
ARM64 = """\
`models/tiny-phi3`, built on an emulated ARM64 processor and on x86-64: whether the folders are equal byte for byte
(but for the time that the build took), and 24 greedy tokens on each emulated processor against x86-64, with the
relative error of the logits. int4 and int8 round activations to 8 bits, each processor's kernels in their own way.

| target | precision | recipe | folders | processor | equal tokens of 24 | logits |
|---|---|---|---|---|---|---|
"""
PARITY = """\
Logits of tiny random models: relative error after a prefill of 24 tokens and after 8 further steps, and how many
of 40 greedy tokens are equal before the first near tie that falls the other way. fp16 and bf16 are compared with
transformers in fp32; int4 and int8 with the same folder on the CPU, since rounding weights moves random models
far from their checkpoints. Where int4 and int8 round activations to 8 bits, device and CPU do so in their own
ways, which is most of the difference; `exact` is the same without that (`accuracy_level=0`). Ragged batches,
reordered rows, rewinding, restored prompt caches and a cache that grows are compared with single runs on the
device: the last number is the largest error among them.
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
    arm = RESULTS / "check_arm64-qemu.json"
    emulated = json.loads(arm.read_text(encoding="utf-8")) if arm.is_file() else None
    parts = [matrix(results, emulated)]
    for number, result in enumerate(results):
        parts += [heading(result), *([PARITY] if number == 0 else []), parity(result["parity"])]
        if result.get("speed"):
            parts.append(speed(result["speed"], result.get("again", ())))
    if emulated is not None:
        parts.append(arm64(emulated))
    return "\n".join(parts)


def matrix(results: Sequence[Mapping[str, Any]], emulated: Mapping[str, Any] | None) -> str:
    """Return the table of what was run where."""
    lines = []
    support = json.loads((RESULTS / "device_support.json").read_text(encoding="utf-8"))
    for target in TARGETS.values():
        reasons = sorted(support["refused"][target.name].items())
        refused = ", ".join(f"{reason} ({len(names)})" for reason, names in reasons)
        for precision in {**target.precisions, **target.without_fp16}:
            rows = [
                row
                for result in results
                if result["device"].partition(":")[0] == target.name
                for row in result["parity"]
                if row["precision"] == precision and "ok" in row
            ]
            good = len({row["family"] for row in rows if row["ok"]})
            run = f"{good} of {len({row['family'] for row in rows})} families right" if rows else ""
            for row in emulated["runs"] if emulated else ():
                if row["ok"] and (row["target"], row["precision"]) == (target.name, precision):
                    run = "`tiny-phi3` on ARM64, emulated"
            tested = support["tested"].get(target.name, {}).get(precision, "")
            run = run or ("" if "families" in tested else "by graph only")
            lines.append(f"| `{target.name}` | {precision} | {run} | {tested} | {refused} |")
    return MATRIX + "\n".join(lines) + "\n"


def ranges(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Return how far runs of the same script on one machine are apart, for a single row."""
    single = [{row["engine"]: row for row in rows if row.get("batch") == 1} for rows in runs]

    def ratios(key: str) -> str:
        found = [run["genai"][key] / run["ortlm"][key] for run in single]
        return f"{min(found):.2f} to {max(found):.2f} (median {statistics.median(found):.2f})"

    def cold(engine: str) -> str:
        found = [run[engine]["first_token_cold_ms"] / 1e3 for run in single]
        return f"{min(found):.2f} to {max(found):.2f} s"

    return "\n" + "\n".join(
        (
            f"One row in {len(runs)} runs of the script, as a ratio to onnxruntime-genai:",
            f"prefill {ratios('prefill_ms')}; from making the generator, which is where that one",
            "allocates its cache, to the first token",
            f"{ratios('first_token_ms')}. The first token of a new process comes after {cold('ortlm')}, with",
            f"onnxruntime-genai after {cold('genai')}.",
        )
    )


def arm64(found: Mapping[str, Any]) -> str:
    """Return the section of the emulated ARM64 processors."""
    machine = found["machine"]
    qemu = machine["qemu"].partition(" (")[0].removeprefix("qemu-aarch64 version ")
    head = f"### `cpu`: ARM64 in QEMU {qemu}, ONNX Runtime {machine['arm64']['onnxruntime']}\n\n"
    lines = []
    for row in found["runs"]:
        key = ("target", "precision", "recipe")
        build = next(b for b in found["builds"] if all(b[k] == row[k] for k in key))
        same = "failed" if build.get("error") else "equal"
        if build.get("differ"):
            same = "differ: " + ", ".join(build["differ"])
        start = f"| `{row['target']}` | {row['precision']} | {row['recipe']} | {same} | {row['cpu']} "
        if row.get("error"):
            lines.append(f"{start}| failed | |")
            continue
        equal = str(row["equal"])
        if "gap" in row:
            equal += f", then a gap of {row['gap']:.1e}"
        lines.append(f"{start}| {equal} | {row['logits_error']:.1e} |")
    return head + ARM64 + "\n".join(lines) + "\n"


def heading(result: Mapping[str, Any]) -> str:
    """Return the heading of one device."""
    machine = result["machine"]
    gpu = (machine.get("gpu") or machine["system"]).split(",")[0]
    found = f"### `{result['device']}`: {gpu}, ONNX Runtime {machine['onnxruntime']}\n"
    return found + f"\nPython {machine['python']}, numpy {machine['numpy']}.\n"


def parity(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what ten families of tiny random models compute."""
    lines = [
        "| family | precision | against | prefill | 8 steps | greedy of 40 | among themselves |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"| `{row['family']}` | {row['precision']} "
        if "refused" in row:
            lines.append(f"{name}| | refused | | | |")
            continue
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


def speed(rows: Sequence[Mapping[str, Any]], again: Sequence[Sequence[Mapping[str, Any]]] = ()) -> str:
    """Return the table of speeds next to onnxruntime-genai's on the same folder; ``again`` are more runs."""
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
    if again:
        lines.append(ranges([rows, *again]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
