"""An evaluation on a cluster has the figures of one machine, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ortlm.evaluation.evaluate import evaluate
from tests.evaluation.conftest import builds

__all__ = ["builds"]


@pytest.mark.parametrize("reference", ["fp32", "checkpoint"])
def test_the_same_figures(cluster: Any, builds: Callable[[str], Path], tiny: Path, reference: str) -> None:
    base = tiny if reference == "checkpoint" else builds("fp32")
    how: dict[str, Any] = {"reference": base, "chunk": 128, "speed": False, "threads": 1}
    local = evaluate(builds("int4"), **how)
    found = evaluate(builds("int4"), **how, ray=cluster.address)
    for key in local.data:
        if key != "created":
            assert found.data[key] == local.data[key], key
