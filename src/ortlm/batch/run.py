"""A batch, top to bottom: go through the input, take the results folder, answer what is left."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ortlm.artifact import open_artifact
from ortlm.batch.answering import Answerer, Result
from ortlm.batch.results import Counts, Identity, Results
from ortlm.batch.rows import Row, read, survey
from ortlm.batch.scheduling import WINDOW_ROWS, answer_all
from ortlm.cluster.model_files import model_digest
from ortlm.runtime.language_model import load
from ortlm.runtime.multimodal.addresses import Allow, public_address
from ortlm.server.models import Models, named
from ortlm.server.served import ServedModel
from ortlm.serving.engine import Engine, EngineOptions

# Requests of the rows that are under way may be so many: a row can ask for many answers.
_QUEUE = 4096


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How a batch is run.

    ``model``: FOLDER or NAME=FOLDER, the name being what requests call it. ``limit``: answer the first so
    many rows only. ``batch``: requests that run at once. ``cache_tokens``, ``prefix_bytes``, ``seconds``: as
    EngineOptions has them. ``retries``: how often a request is tried again that failed for a reason not its
    own. ``machine``: arguments of ``ortlm.load`` that say where it runs.
    """

    model: str
    input: Path
    output: Path
    limit: int | None = None
    batch: int = 16
    cache_tokens: int | None = None
    prefix_bytes: int | None = None
    seconds: float | None = None
    retries: int = 2
    remote_images: bool = False
    machine: Mapping[str, Any] = field(default_factory=dict)


class Watcher(Protocol):
    """Is told how far a batch has come, in the thread that called for it."""

    def started(self, rows: int, counts: Counts) -> None:
        """Take note that of ``rows`` rows some are done already, as ``counts`` says."""

    def advanced(self, counts: Counts) -> None:
        """Take note that one more is."""


class Work(Protocol):
    """Answers rows somewhere, and calls ``put`` with each result, in the thread that called."""

    def __call__(self, rows: Iterator[Row], put: Callable[[Result], None]) -> None:
        """Answer all ``rows``, each once."""


def run_batch(options: BatchOptions, watcher: Watcher, work: Work | None = None) -> Counts:
    """Answer the requests in ``options.input``, but for those that ``options.output`` has the results of.

    ``work`` answers them, by default an engine on this machine. Raises BadOption, BadArtifact, and Error if nobody
    can answer any more; what is written then is resumed from.
    """
    name, folder = named([options.model])[0]
    artifact = open_artifact(folder)
    found = survey(options.input)
    rows = found.rows if options.limit is None else min(found.rows, options.limit)
    identity = Identity(
        input={"name": options.input.name, "sha256": found.sha256, "bytes": found.bytes, "rows": found.rows},
        model={"name": name, "sha256": model_digest(artifact.path)},
        options={
            "device": options.machine.get("device"),
            "device_options": dict(options.machine.get("device_options") or {}),
            "cache_tokens": options.cache_tokens,
            "timeout": options.seconds,
            "remote_images": options.remote_images,
        },
    )
    with Results(options.output, identity, found.rows) as results:
        watcher.started(rows, results.counts)
        if results.is_left(rows):
            wanted = itertools.takewhile(lambda row: row.number < rows, read(found))
            left = (row for row in wanted if not results.is_done(row.number))

            def put(result: Result) -> None:
                results.put(result)
                watcher.advanced(results.counts)

            if work is None:
                answer_here(options, left, put)
            else:
                work(left, put)
        return results.counts


def answer_here(options: BatchOptions, rows: Iterator[Row], put: Callable[[Result], None]) -> None:
    """Answer ``rows`` with an engine on this machine."""
    with serving(options) as models:
        answerer = Answerer(models, retries=options.retries)
        asyncio.run(answer_all(answerer, rows, put, at_once=at_once(options), window=WINDOW_ROWS))


def at_once(options: BatchOptions) -> int:
    """Return how many rows are under way: those that run, and as many that are ready when a slot is free."""
    return 2 * options.batch


@contextmanager
def serving(options: BatchOptions, folder: str | None = None) -> Iterator[Models]:
    """Load the model, or the same one in ``folder``, and begin an engine for it."""
    name, own = named([options.model])[0]
    allow: Allow = public_address if options.remote_images else _never
    lm = load(folder or own, prefix_caches=0, allow_address=allow, **options.machine)
    engine = Engine(
        lm,
        EngineOptions(
            batch=options.batch,
            queue=_QUEUE,
            cache_tokens=options.cache_tokens,
            prefix_bytes=options.prefix_bytes,
            # Tokens of answers round in another way than prompts: what comes out would depend on the order.
            reuse_answers=False,
            seconds=options.seconds,
        ),
    )
    try:
        yield Models([ServedModel(name, lm, engine)])
    finally:
        engine.close()


def _never(_: Any) -> bool:
    return False
