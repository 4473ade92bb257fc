"""Write what frontier.py and compare_lm_eval.py found into docs: tables, and a plot for each model.

    python benchmarks/tabulate_frontier.py

reads ``benchmarks/results/frontier-*.json`` and ``lm_eval-*.json``, and writes a section of
``docs/quantization-results.md`` and ``docs/images/frontier-*.svg``.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "quantization-results.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- frontier: begin, written by benchmarks/tabulate_frontier.py -->", "<!-- frontier: end -->"
# By the beginning of a row's name.
_TOOLS = {
    "ortlm": "#c2410c",
    "official": "#4d7c0f",
    "llama.cpp": "#2563eb",
    "OpenVINO": "#7c3aed",
    "AutoRound": "#0f766e",
}
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 50
_SEED = ", seed "


def main() -> int:
    """Write page and plots."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, drawing in plots().items():
        (IMAGES / name).write_text(drawing, encoding="utf-8")
    return 0


def page(text: str) -> str:
    """Return ``text``, the page, with the section made again from the results."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section()}\n{END}{after}"


def plots() -> dict[str, str]:
    """Return the plots by the names of their files."""
    return {f"frontier-{found['model']}.svg": plot(found) for found in read("frontier")}


def read(kind: str) -> list[dict[str, Any]]:
    """Return the results of one kind, in the order of their files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def section() -> str:
    """Return the section in Markdown."""
    parts = [frontier(found) for found in read("frontier")]
    for path in sorted(RESULTS.glob("lm_eval-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        parts.append(scores(path.stem.removeprefix("lm_eval-"), found))
    return "\n".join(parts)


def merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows by size; rows that differ by their seed alone become one, with the median."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"].partition(_SEED)[0], []).append(row)
    found = []
    for name, group in groups.items():
        klds = sorted(row["kld"] for row in group)
        whole = {key: statistics.median(row[key] for row in group) for key in ("bytes", "kld", "top1")}
        found.append({"name": name, **whole, "klds": klds})
    return sorted(found, key=lambda row: (row["bytes"], row["kld"]))


def best(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of the rows of which no other is smaller and nearer."""
    return {
        row["name"]
        for row in rows
        if not any(
            other is not row and other["bytes"] <= row["bytes"] and other["kld"] <= row["kld"]
            for other in rows
        )
    }


def frontier(found: Mapping[str, Any]) -> str:
    """Return the part of one model."""
    rows = merged(found["rows"])
    front = best(rows)
    about = (
        f"{found['tokens']:,} tokens; {found['parameters'] / 1e6:,.1f} million weights in matrices. All that "
        f"calibrate read the same {found['calibration_tokens']:,} tokens, which a `fast` build writes.\n"
        "**Bold**: nothing else in the table is both smaller and nearer."
    )
    lines = [
        f"### {found['model']}",
        "",
        about,
        "",
        f"![Size against KL divergence of {found['model']}](images/frontier-{found['model']}.svg)",
        "",
        "| | MB | bits per weight | KL divergence | top-1 agreement |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['name']}**" if row["name"] in front else row["name"]
        # Four digits after the point, or two that count.
        places = max(4, 1 - math.floor(math.log10(row["kld"])))
        kld = f"{row['kld']:.{places}f}"
        if len(row["klds"]) > 1:
            spread = f"{row['klds'][0]:.{places}f} to {row['klds'][-1]:.{places}f}"
            kld += f" (median of {len(row['klds'])} seeds, {spread})"
        bits = 8 * row["bytes"] / found["parameters"]
        lines.append(f"| {name} | {row['bytes'] / 1e6:.2f} | {bits:.2f} | {kld} | {row['top1']:.1%} |")
    missing = sorted(found["missing"].items())
    if missing:
        lines += ["", "Not measured: " + "; ".join(name for name, _ in missing) + "."]
    return "\n".join(lines) + "\n"


def scores(model: str, found: Mapping[str, Any]) -> str:
    """Return the table of one model's scores of lm-evaluation-harness."""
    columns = [
        ("last_word", "acc"), ("last_word", "perplexity"), ("continuation", "acc_norm"), ("capital", "acc"),
    ]  # fmt: skip
    first = next(iter(found.values()))
    names = [f"{task}, {metric} (n = {first[task]['samples']})" for task, metric in columns]
    lines = [
        f"### {model} by lm-evaluation-harness",
        "",
        "`benchmarks/compare_lm_eval.py`, on tasks made of the project's own text; ± is one standard error.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name, tasks in found.items():
        cells = []
        for task, metric in columns:
            value, error = tasks[task][metric], tasks[task][f"{metric}_stderr"]
            percent = metric.startswith("acc")
            cells.append(f"{value:.1%} ± {error:.1%}" if percent else f"{value:.1f} ± {error:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any]) -> str:
    """Return sizes against KL divergences, each tool in its own color, with a line through the best of ortlm."""
    rows = merged(found["rows"])
    sizes = [8 * row["bytes"] / found["parameters"] for row in rows]
    low, high = math.floor(min(sizes)), math.ceil(max(sizes))
    bottom = math.floor(math.log10(min(row["kld"] for row in rows)))
    top = math.ceil(math.log10(max(row["kld"] for row in rows)))

    def x(bits: float) -> float:
        return _LEFT + (bits - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(kld: float) -> float:
        return _TOP + (top - math.log10(kld)) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>']
    for power in range(bottom, top + 1):
        at = y(10.0**power)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e8f0"/>'
        )
        parts.append(_text(_LEFT - 8, at + 4, f"{10.0**power:g}", "end"))
    below = _HEIGHT - _BOTTOM + 18
    parts += [_text(x(bits), below, str(bits), "middle") for bits in range(low, high + 1)]
    ours = [row for row in rows if row["name"].startswith("ortlm")]
    front = [row for row in ours if row["name"] in best(ours)]
    points = " ".join(f"{x(8 * r['bytes'] / found['parameters']):.1f},{y(r['kld']):.1f}" for r in front)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{_TOOLS["ortlm"]}" stroke-width="1.5"/>')
    for row, bits in zip(rows, sizes, strict=True):
        color = next(color for tool, color in _TOOLS.items() if row["name"].startswith(tool))
        parts.append(
            f'<circle cx="{x(bits):.1f}" cy="{y(row["kld"]):.1f}" r="4" fill="{color}">'
            f"<title>{escape(row['name'])}: {row['bytes'] / 1e6:.2f} MB, {row['kld']:.4f}</title></circle>"
        )
    used = [tool for tool in _TOOLS if any(row["name"].startswith(tool) for row in rows)]
    for number, tool in enumerate(used):
        at = _TOP + 14 + 18 * number
        parts.append(f'<circle cx="{_WIDTH - 120}" cy="{at}" r="4" fill="{_TOOLS[tool]}"/>')
        parts.append(_text(_WIDTH - 110, at + 4, tool, "start"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_text(middle, _HEIGHT - 10, "bits per weight, with scales, embeddings and head", "middle"))
    parts.append(
        f'<text transform="translate(16 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle" '
        'font-size="13" fill="#334155">mean KL divergence (nats)</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" aria-label="Size against KL divergence of {escape(found["model"])}">'
        + "\n".join(parts)
        + "</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    start = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="#334155">'
    return f"{start}{escape(text)}</text>"


if __name__ == "__main__":
    sys.exit(main())
