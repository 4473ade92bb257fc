"""A comparison in several runs of chunks is that of all chunks, bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ortlm.artifact.provenance import Origin
from ortlm.cluster.model_files import Model
from ortlm.errors import BadOption
from ortlm.evaluation.chunks import Chunks, make_chunks, read_text
from ortlm.evaluation.cluster import EvaluationWorker, check_cluster, chunk_runs
from ortlm.evaluation.compare import compare, joined
from ortlm.evaluation.sources import ArtifactSource, open_checkpoint
from ortlm.runtime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def chunks(tiny: Path) -> Chunks:
    return make_chunks(read_text(None), Tokenizer.open(tiny), size=128)


@pytest.mark.parametrize("workers", [1, 2, 3, 1000])
def test_runs_hold_every_chunk_once_and_begin_where_batches_do(chunks: Chunks, workers: int) -> None:
    runs = chunk_runs(chunks, workers)
    assert [run.first for run in runs] == list(np.cumsum([0, *(len(run.chunks.tokens) for run in runs[:-1])]))
    assert np.array_equal(np.concatenate([run.chunks.tokens for run in runs]), chunks.tokens)
    # 2,048 tokens go through a layer together.
    assert all(run.first % 16 == 0 for run in runs)
    assert len(runs) <= workers


@pytest.mark.parametrize("reference", ["fp32", "checkpoint"])
def test_runs_joined_are_all_of_it(
    builds: Callable[[str], Path], tiny: Path, chunks: Chunks, reference: str
) -> None:
    base = tiny if reference == "checkpoint" else builds("fp32")
    source = open_checkpoint(Origin(str(tiny)), threads=1) if base == tiny else ArtifactSource(base, 1)
    source.open(chunks.tokens)
    model = ArtifactSource(builds("int4"), 1)
    model.open(chunks.tokens)
    whole = compare(model, source, chunks)
    runs = chunk_runs(chunks, 3)
    assert len(runs) > 1
    worker = EvaluationWorker(1, 1)
    asyncio.run(worker.begin([Model.of(builds("int4")), Model.of(base)], None))
    parts = [asyncio.run(worker.work(run)) for run in runs]
    found = joined([(first, part.comparison) for first, part in parts])
    for name in ("nll", "base_nll", "kld", "same_top"):
        assert np.array_equal(getattr(found.scores, name), getattr(whole.scores, name)), name
    assert np.array_equal(found.kinds, whole.kinds)
    assert found.worst == whole.worst


def test_what_a_cluster_does_not_do(tmp_path: Path) -> None:
    here = Origin(str(tmp_path))
    with pytest.raises(BadOption, match="--ray does not go with --layers"):
        check_cluster(here, layers=True, drift=False, device=None)
    with pytest.raises(BadOption, match="--ray does not go with --drift"):
        check_cluster(here, layers=False, drift=True, device=None)
    with pytest.raises(BadOption, match="--ray runs on CPUs only, and --device is webgpu"):
        check_cluster(here, layers=False, drift=False, device="webgpu")
    with pytest.raises(
        BadOption, match="--ray takes a reference that is a folder, and this one is user/name"
    ):
        check_cluster(Origin("user/name"), layers=False, drift=False, device=None)
