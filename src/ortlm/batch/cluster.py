"""A batch on a cluster: workers with an engine each, and one writer of results, the process that asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ortlm._utils.cpu import physical_cores
from ortlm._version import __version__
from ortlm.artifact import open_artifact
from ortlm.batch.answering import Answerer, Result, not_answered
from ortlm.batch.rows import Row
from ortlm.batch.run import BatchOptions, at_once, serving
from ortlm.batch.scheduling import Window, answer_all
from ortlm.cluster.connection import connected
from ortlm.cluster.model_files import Model, Pieces, fetch, folder_of
from ortlm.cluster.pool import Pool, cpus_each
from ortlm.errors import BadOption
from ortlm.server.models import named

# Tasks that a worker has at a time; a task is a few rows, so that none waits long for the longest of its task.
_DEPTH = 4
# A row that is alone when its worker ends, after as many of them have, is at fault itself.
_MOST_LOSSES = 5


class BatchWorker:
    """An engine on some node, which answers rows for whoever made it."""

    def __init__(self, options: BatchOptions, cpus: int) -> None:
        self._options, self._cpus = options, cpus

    async def begin(self, models: Sequence[Model], pieces: Sequence[Pieces] | None) -> str:
        """Load the model, and return the version of ortlm."""
        folder = folder_of(models[0], pieces[0] if pieces else None, fetch)
        machine = dict(self._options.machine)
        machine["threads"] = machine.get("threads") or min(self._cpus, physical_cores())
        # Never left: the process ends without asking.
        self._serving = serving(replace(self._options, machine=machine), str(folder))
        self._answerer = Answerer(self._serving.__enter__(), retries=self._options.retries)
        return __version__

    async def work(self, rows: Sequence[Row]) -> list[Result]:
        """Answer ``rows``."""
        results: list[Result] = []
        await answer_all(self._answerer, rows, results.append, at_once=len(rows))
        return results


def answer_on(
    address: str,
    options: BatchOptions,
    rows: Iterator[Row],
    put: Callable[[Result], None],
    *,
    shared: Model | None = None,
) -> None:
    """Answer ``rows`` with the cluster at ``address``, and ``put`` the results here.

    ``shared`` is what workers are told of the model, by default where it lies here. A row whose worker has
    ended is given to another; one that has ended several workers gets an error. Raises BadOption if there is
    no cluster.
    """
    device = options.machine.get("device")
    if device not in (None, "cpu"):
        raise BadOption(f"--ray runs on CPUs only, and --device is {device}. Leave it out.")
    artifact = open_artifact(named([options.model])[0][1])
    size = max(1, at_once(options) // _DEPTH)

    def done(results: list[Result], losses: int) -> None:
        for result in results:
            put(replace(result, retries=result.retries + losses))

    def lost(task: list[Row], losses: int, why: str) -> list[list[Row]]:
        if len(task) > 1:
            # Halves, so that a row that ends every worker is alone soon.
            return [task[: len(task) // 2], task[len(task) // 2 :]]
        if losses <= _MOST_LOSSES:
            return [task]
        said = f"line {task[0].line}: {losses} workers ended while they answered it; the last one: {why}"
        put(not_answered(task[0], "worker_ended", said, retries=losses))
        return []

    with connected(address) as ray:
        cpus = cpus_each(ray, options.machine.get("threads"))
        pool: Pool[list[Row], list[Result]] = Pool(
            ray,
            BatchWorker,
            (options, cpus),
            [artifact.path],
            cpus=cpus,
            depth=_DEPTH,
            shared=None if shared is None else [shared],
        )
        pool.run(_chunks(Window(rows), size), done, lost)


def _chunks(window: Window, size: int) -> Iterator[list[Row]]:
    """Yield the rows of ``window`` as lists of ``size``."""
    while True:
        rows = [row for _ in range(size) if (row := window.pop()) is not None]
        if not rows:
            return
        yield rows
