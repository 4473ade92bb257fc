"""What it takes to write the text that calibration reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.builder import estimate
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.calibration import dataset, writing
from ortlm.runtime.language_model import LanguageModel


@pytest.mark.parametrize(("memory", "wanted"), [(None, True), (2_999, False), (3_000, True)])
def test_a_byte_for_each_weight_if_memory_suffices(
    memory: int | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "memory_bytes", lambda: memory)
    assert writing.draft_in_8_bits(1_000) is wanted
    weights = 1_000 if wanted else 625
    assert writing.writing_bytes(1_000, rows=2, row_bytes=10, vocab=5) == weights + 2 * (10 + 40)


@pytest.mark.parametrize(
    ("row_bytes", "vocab", "rows"),
    [
        (1 << 10, 100, 256),  # small: no more than that
        (1 << 22, 32_064, 128),  # 512 MB
        (1 << 25, 32_064, 64),  # more than that, for as many rows
        (1 << 27, 32_064, 16),  # 2 GB
        (1 << 32, 32_064, 1),
        (1 << 10, 262_144, 128),  # logits of 128 MB
    ],
)
def test_rows_at_once(row_bytes: int, vocab: int, rows: int) -> None:
    assert writing.rows_at_once(row_bytes, vocab) == rows


def test_the_cache_holds_a_row_and_no_more(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = ortlm.build(tiny, tmp_path / "fast", options=BuildOptions(recipe="fast", layers=1))
    loops = []

    class Watched(LanguageModel):
        def loop(self, **given: Any) -> Any:
            loop = super().loop(**given)
            loops.append(loop)
            return loop

    monkeypatch.setattr(dataset, "LanguageModel", Watched)
    rows = dataset.write_rows(artifact, count=3, length=40, seed=0, threads=1, advance=lambda count: None)
    assert [len(row) for row in rows] == [40] * 3
    assert [loop.cache.capacity for loop in loops] == [40]


def test_memory_that_is_told_before(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What writing takes counts where that is more than what calibration takes, and no file is given."""
    spec = prepare(BuildRequest(tiny)).spec
    monkeypatch.setattr(writing, "memory_bytes", lambda: None)
    own = estimate.CalibrationPlan(estimate.OWN_TEXT, rows=192, length=128)
    given = replace(own, source="a file")
    told = [estimate._calibration_bytes(spec, plan, 2_000_000_000) for plan in (own, given)]
    assert told[0] > 2_000_000_000 > 10 * told[1]
