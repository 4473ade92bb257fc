"""Workers on all nodes of a cluster, and who does what: a task that is lost with its node is given out again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ortlm._version import __version__
from ortlm.cluster.connection import processors
from ortlm.cluster.model_files import Model, NoModel, Pieces, put_pieces
from ortlm.errors import Error

_T = TypeVar("_T")
_R = TypeVar("_R")

_LOOK_SECONDS = 0.5
_COUNT_SECONDS = 5.0
# Workers that did not begin, one after the other, before that is no accident.
_MOST_FAILED_BEGINNINGS = 8


@dataclass
class _Worker:
    actor: Any
    ready: bool = False
    running: int = 0
    gone: bool = False


@dataclass(frozen=True)
class _Given(Generic[_T]):
    worker: _Worker
    task: _T | None
    losses: int = 0


class Pool(Generic[_T, _R]):
    """Workers, as many as the cluster has room for at any time, that turn tasks into results.

    ``kind`` is the class of workers, each made with ``arguments``: of its methods, ``begin(model, pieces)`` loads
    models and returns the version of ortlm, ``work(task)`` returns a result; both are coroutines. ``models`` are
    folders, copied to nodes that lack them. Each worker has ``cpus`` processors and ``depth`` tasks at a time.
    """

    def __init__(
        self,
        ray: Any,
        kind: type[Any],
        arguments: Sequence[Any],
        models: Sequence[Path],
        *,
        cpus: int,
        depth: int,
        shared: Sequence[Model] | None = None,
    ) -> None:
        self._ray, self._cpus, self._depth = ray, cpus, depth
        self._folders = models
        self._models = list(shared) if shared is not None else [Model.of(folder) for folder in models]
        self._pieces: list[Pieces] | None = None
        self._make = ray.remote(num_cpus=cpus, max_restarts=0, max_concurrency=depth + 1)(kind)
        self._arguments = arguments
        self._workers: list[_Worker] = []
        self._given: dict[Any, _Given[_T]] = {}
        self._failed_beginnings = 0
        self._counted = 0.0

    def run(
        self,
        tasks: Iterable[_T],
        done: Callable[[_R, int], None],
        lost: Callable[[_T, int, str], Iterable[_T]],
    ) -> None:
        """Give out ``tasks``, and call ``done`` with each result and how often it was lost before.

        ``lost`` is called with a task that was lost with its worker, how often that happened to it, and why; it
        returns what is to be given out in its place. Tasks are taken as workers are free for them.
        Raises Error if no worker can begin, and what ``done`` and ``lost`` raise.
        """
        coming = iter(tasks)
        again: deque[tuple[_T, int]] = deque()
        try:
            while True:
                self._grow()
                more = self._give(coming, again)
                if (
                    not more
                    and not again
                    and not any(given.task is not None for given in self._given.values())
                ):
                    return
                for reference in self._ended():
                    given = self._given.pop(reference)
                    if given.task is None:
                        self._begun(given.worker, reference)
                        continue
                    given.worker.running -= 1
                    try:
                        result: _R = self._ray.get(reference)
                    except self._ray.exceptions.RayError as error:
                        self._drop(given.worker)
                        losses = given.losses + 1
                        again.extend((task, losses) for task in lost(given.task, losses, _why(error)))
                    else:
                        done(result, given.losses)
        finally:
            for worker in self._workers:
                self._ray.kill(worker.actor)

    def _give(self, coming: Iterator[_T], again: deque[tuple[_T, int]]) -> bool:
        """Give every worker as much as it takes, one each in turn; False if nothing more comes."""
        more = True
        while more or again:
            free = [worker for worker in self._workers if worker.ready and worker.running < self._depth]
            if not free:
                return more
            for worker in sorted(free, key=lambda worker: worker.running):
                if again:
                    task, losses = again.popleft()
                else:
                    found = next(coming, None) if more else None
                    if found is None:
                        more = False
                        break
                    task, losses = found, 0
                worker.running += 1
                self._given[worker.actor.work.remote(task)] = _Given(worker, task, losses)
        return more

    def _ended(self) -> list[Any]:
        references = list(self._given)
        if not references:
            time.sleep(_LOOK_SECONDS)
            return []
        found, _ = self._ray.wait(references, num_returns=1, timeout=_LOOK_SECONDS)
        if found and len(references) > 1:
            # All that are there, since each look is at all of them.
            found, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return list(found)

    def _grow(self) -> None:
        """Make workers for all processors that nodes offer now."""
        now = time.monotonic()
        if now - self._counted < _COUNT_SECONDS:
            return
        self._counted = now
        wanted = sum(count // self._cpus for count in processors(self._ray))
        if not wanted:
            raise Error(
                f"no node of the cluster has {self._cpus} processors, which each worker takes. Lower --threads."
            )
        while len(self._workers) < wanted:
            worker = _Worker(self._make.options(scheduling_strategy="SPREAD").remote(*self._arguments))
            self._workers.append(worker)
            self._begin(worker)

    def _begin(self, worker: _Worker) -> None:
        self._given[worker.actor.begin.remote(self._models, self._pieces)] = _Given(worker, None)

    def _begun(self, worker: _Worker, reference: Any) -> None:
        try:
            version = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NoModel):
                if self._pieces is None:
                    self._pieces = [put_pieces(folder, self._ray.put) for folder in self._folders]
                self._begin(worker)
                return
            if isinstance(error.cause, Error):
                raise error.cause from error
            self._not_begun(worker, error)
        except self._ray.exceptions.RayError as error:
            self._not_begun(worker, error)
        else:
            if version != __version__:
                raise Error(
                    f"a node has ortlm {version}, and this is {__version__}. Install the same everywhere."
                )
            self._failed_beginnings = 0
            worker.ready = True

    def _not_begun(self, worker: _Worker, error: Exception) -> None:
        self._failed_beginnings += 1
        if self._failed_beginnings >= _MOST_FAILED_BEGINNINGS:
            raise Error(
                f"{self._failed_beginnings} workers did not begin, the last one because: {_why(error)}"
            )
        self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        """Have done with ``worker``, whose node may be gone; another one takes its place."""
        if not worker.gone:
            worker.gone, worker.ready = True, False
            self._workers.remove(worker)
            self._ray.kill(worker.actor)
            # Not at once, if the node is gone.
            self._counted = min(self._counted, time.monotonic() - _COUNT_SECONDS + _LOOK_SECONDS)


def cpus_each(ray: Any, threads: int | None) -> int:
    """Return how many processors a worker takes: ``threads``, or all of the smallest node."""
    return threads or min(processors(ray))


def _why(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    lines = str(cause if cause is not None else error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
