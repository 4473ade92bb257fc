"""The page of quantization results says what the results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def module() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "tabulate_frontier.py"
    spec = importlib.util.spec_from_file_location("tabulate_frontier", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_page_and_plots_are_of_the_results(module: Any) -> None:
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text) == text, "run python benchmarks/tabulate_frontier.py"
    for name, drawing in module.plots().items():
        assert (module.IMAGES / name).read_text(encoding="utf-8") == drawing, name


def test_seeds_become_a_median_and_the_best_are_told(module: Any) -> None:
    def row(name: str, size: int, kld: float) -> dict[str, Any]:
        return {"name": name, "bytes": size, "kld": kld, "top1": 0.5}

    rows = module.merged(
        [
            row("a", 10, 0.3),
            row("a, seed 1", 10, 0.1),
            row("a, seed 2", 10, 0.2),
            row("b", 9, 0.4),
            row("c", 11, 0.25),
        ]
    )
    assert [(r["name"], r["kld"]) for r in rows] == [("b", 0.4), ("a", 0.2), ("c", 0.25)]
    assert module.best(rows) == {"a", "b"}
