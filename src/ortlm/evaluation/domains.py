"""The figures of each domain of a text: as reports hold them, and as tables show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.evaluation.chunks import Text
from ortlm.evaluation.compare import Comparison
from ortlm.evaluation.statistics import statistics

COLUMNS = ("domain", "tokens", "PPL(Q)", "PPL(base)", "mean KLD", "top-1, %")


def domains(read: Text, comparison: Comparison) -> list[dict[str, Any]]:
    """Return perplexities, KL divergence and top-1 agreement (percent) of each domain that was read."""
    rows = []
    for number, (kind, _) in enumerate(read.parts):
        own = comparison.kinds == number
        # An error takes two.
        if own.sum() > 1:
            rows.append(_row(kind, statistics(comparison.scores.of(own)).to_dict()))
    return rows


def domain_table(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table of a report's domains, and of all; none if the text is of one.

    The columns are ``COLUMNS``.
    """
    if len(data["kinds"]) < 2:
        return []
    return [
        (
            row["kind"],
            f"{row['tokens']:,}",
            _figure(row["ppl"], 3, error=False),
            _figure(row["base_ppl"], 3, error=False),
            _figure(row["kld"], 4),
            f"{row['same_top']:.1f} ± {row['same_top_standard_error']:.1f}",
        )
        for row in [*data["kinds"], _row("all", data["statistics"])]
    ]


def _row(kind: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``figures`` of a report's statistics that are told of a domain."""
    return {
        "kind": kind,
        "tokens": figures["scored_tokens"],
        **{name: figures[name] for name in ("ppl", "base_ppl", "ppl_ratio", "kld")},
        "same_top": figures["same_top"]["value"],
        "same_top_standard_error": figures["same_top"]["standard_error"],
    }


def _figure(figure: Mapping[str, Any], digits: int, *, error: bool = True) -> str:
    if figure["value"] is None:
        return "not finite"
    more = f" ± {figure['standard_error'] or 0:.{digits}f}" if error else ""
    return f"{figure['value']:.{digits}f}{more}"
