"""A comparison on a cluster: workers read runs of chunks, whose scores are put together in their order.

A worker's runs begin where the batches of a single machine begin, so that every product has the same shape
there and here, and rounds in the same way.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ortlm._utils.cpu import physical_cores
from ortlm._version import __version__
from ortlm.artifact.provenance import Origin
from ortlm.cluster.connection import connected, processors
from ortlm.cluster.model_files import Model, Pieces, fetch, folder_of
from ortlm.cluster.pool import Pool, cpus_each
from ortlm.errors import BadOption, Error
from ortlm.evaluation.chunks import Chunks
from ortlm.evaluation.compare import Comparison, compare, joined
from ortlm.evaluation.sources import ArtifactSource, is_artifact, open_checkpoint
from ortlm.layerwise.alignment import batch_rows

_MOST_LOSSES = 5


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """Some chunks of a text, of which the first has the number ``first``."""

    first: int
    chunks: Chunks


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a comparison; ``one_by_one`` as ArtifactSource has it."""

    comparison: Comparison
    one_by_one: bool


class EvaluationWorker:
    """Both models on some node."""

    def __init__(self, threads: int | None, cpus: int) -> None:
        self._threads = threads or min(cpus, physical_cores())

    async def begin(self, models: Sequence[Model], pieces: Sequence[Pieces] | None) -> str:
        """Load the artifact, find the reference, and return the version of ortlm."""
        built, base = (
            folder_of(model, pieces[number] if pieces else None, fetch) for number, model in enumerate(models)
        )
        self._base = (
            ArtifactSource(base, self._threads)
            if is_artifact(base)
            else open_checkpoint(Origin(str(base)), threads=self._threads)
        )
        self._model = ArtifactSource(built, self._threads)
        return __version__

    async def work(self, run: ChunkRun) -> tuple[int, Found]:
        """Compare both on the chunks of ``run``, and return its first chunk's number too."""
        return run.first, await asyncio.to_thread(self._compared, run.chunks)

    def _compared(self, chunks: Chunks) -> Found:
        self._base.open(chunks.tokens)
        self._model.open(chunks.tokens)
        return Found(compare(self._model, self._base, chunks), self._model.one_by_one)


def check_cluster(base: Origin, *, layers: bool, drift: bool, device: str | None) -> None:
    """Raise BadOption for what a cluster does not do."""
    if layers or drift:
        raise BadOption(
            f"--ray does not go with {'--layers' if layers else '--drift'}. Leave one of them out."
        )
    if device not in (None, "cpu"):
        raise BadOption(f"--ray runs on CPUs only, and --device is {device}. Leave it out.")
    if base.adapters or not Path(base.source).is_dir():
        raise BadOption(
            f"--ray takes a reference that is a folder, and this one is {base.source}"
            f"{' with adapters' if base.adapters else ''}. Give a folder as --reference."
        )


def compare_on(
    address: str,
    built: Path,
    base: Path,
    chunks: Chunks,
    *,
    threads: int | None,
    advance: Callable[[int], None],
) -> Found:
    """Return what ``compare`` would, with workers on the cluster at ``address``; ``advance`` counts chunks.

    Raises BadOption if there is no cluster, Error if workers end again and again.
    """
    found: dict[int, Found] = {}

    def done(result: tuple[int, Found], losses: int) -> None:
        first, part = result
        found[first] = part
        advance(len(part.comparison.scores.nll) // (chunks.size - 1 - chunks.first))

    def lost(run: ChunkRun, losses: int, why: str) -> list[ChunkRun]:
        if losses > _MOST_LOSSES:
            raise Error(f"{losses} workers ended while they read chunk {run.first}; the last one: {why}")
        return [run]

    with connected(address) as ray:
        cpus = cpus_each(ray, threads)
        workers = max(1, sum(count // cpus for count in processors(ray)))
        pool: Pool[ChunkRun, tuple[int, Found]] = Pool(
            ray, EvaluationWorker, (threads, cpus), [built, base], cpus=cpus, depth=1
        )
        pool.run(chunk_runs(chunks, workers), done, lost)
    parts = sorted(found.items())
    return Found(
        joined([(first, part.comparison) for first, part in parts]), any(part.one_by_one for _, part in parts)
    )


def chunk_runs(chunks: Chunks, workers: int) -> list[ChunkRun]:
    """Return ``chunks`` as a run for each of ``workers``, or as many as there are."""
    unit = batch_rows(chunks.size)
    size = unit * max(1, math.ceil(len(chunks.tokens) / unit / workers))
    return [
        ChunkRun(
            first,
            replace(
                chunks, tokens=chunks.tokens[first : first + size], kinds=chunks.kinds[first : first + size]
            ),
        )
        for first in range(0, len(chunks.tokens), size)
    ]
