"""The headline figures as a section of the model card, which every evaluation replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm._utils.formatting import readable_bytes
from ortlm.evaluation.domains import COLUMNS, domain_table

_BEGIN, _END = "<!-- ortlm evaluate: begin -->", "<!-- ortlm evaluate: end -->"
_BEFORE = "## Limits"


def with_section(card: str, section: str) -> str:
    """Return the text ``card`` with ``section`` in an earlier one's place, before its limits, or at its end."""
    block = f"{_BEGIN}\n{section.strip()}\n{_END}"
    start = card.find(_BEGIN)
    end = card.find(_END, start)
    if 0 <= start < end:
        return card[:start] + block + card[end + len(_END) :]
    at = card.find(f"\n{_BEFORE}\n")
    if at >= 0:
        return f"{card[: at + 1]}{block}\n\n{card[at + 1 :]}"
    return f"{card.rstrip()}\n\n{block}\n"


def quality_section(data: Mapping[str, Any]) -> str:
    """Return the section's Markdown for a report's ``data``."""
    figures, text = data["statistics"], data["text"]
    kld, percent = figures["kld"], figures["kld_percentiles"]
    rows = [
        ("Mean KL divergence", f"{_number(kld, 5)} nats"),
        (
            "Median, 99th percentile, maximum",
            ", ".join(f"{percent[key]:.5f}" for key in ("median", "p99", "maximum")),
        ),
        ("Top-1 agreement", f"{_number(figures['same_top'], 2)} %"),
        ("RMS Δp", f"{_number(figures['delta_p_rms'], 2)} %"),
        ("Perplexity", f"{_number(figures['ppl'], 3)} (reference: {_number(figures['base_ppl'], 3)})"),
        ("Perplexity ratio", _number(figures["ppl_ratio"], 4)),
    ]
    speed = (data.get("speed") or {}).get("artifact")
    if speed:
        memory = speed.get("resident_bytes")
        rows.append(
            (
                f"Speed, {speed['threads']} threads",
                f"prefill {speed['prefill_tokens_per_second']:.0f}, decode "
                f"{speed['decode_tokens_per_second']:.0f} tokens/s"
                + (f", {readable_bytes(memory)} of memory" if memory else ""),
            )
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""\
## Quality

Compared with `{data["reference"]["name"]}` on {figures["scored_tokens"]:,} tokens of {text["name"]}, in chunks of
{text["chunk_tokens"]} whose second half is scored; ± is one standard error.

| | |
|---|---|
{table}
{_domains(data)}
Written by `ortlm evaluate`. Compare only figures of the same text and chunks.
"""


def _domains(data: Mapping[str, Any]) -> str:
    rows = domain_table(data)
    if not rows:
        return ""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(figure: Mapping[str, Any], digits: int) -> str:
    if figure["value"] is None:
        return "not finite"
    return f"{figure['value']:.{digits}f} ± {figure['standard_error'] or 0:.{digits}f}"
