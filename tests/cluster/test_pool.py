"""Tasks on a cluster: each has one result, whatever ends its worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

import ortlm
from ortlm.cluster.connection import connected, import_ray, processors
from ortlm.cluster.model_files import Model, NoModel, Pieces, folder_of, model_digest, put_pieces
from ortlm.cluster.pool import Pool
from ortlm.errors import BadArtifact, BadOption, Error


class Doubler:
    """A worker that ends with its process at task -1, and raises at -2."""

    def __init__(self, version: str = ortlm.__version__, failure: Exception | None = None) -> None:
        self._version, self._failure = version, failure

    async def begin(self, models: Sequence[Model], pieces: Sequence[Pieces] | None) -> str:
        if self._failure is not None:
            raise self._failure
        return self._version

    async def work(self, task: int) -> int:
        if task == -1:
            os._exit(1)
        if task == -2:
            raise ValueError("this task cannot be done")
        return 2 * task


def pool(ray: Any, *arguments: Any, cpus: int = 1) -> Pool[int, int]:
    return Pool(ray, Doubler, arguments, [], cpus=cpus, depth=2)


def test_every_task_once_and_a_poisoned_one_ends(cluster: Any) -> None:
    found: list[int] = []
    ended: list[tuple[int, int, str]] = []

    def lost(task: int, losses: int, why: str) -> list[int]:
        if task < 0 and losses == 2:
            ended.append((task, losses, why))
            return []
        return [task]

    tasks = [*range(20), -1, *range(20, 40), -2, *range(40, 60)]
    with connected(cluster.address) as ray:
        assert set(processors(ray)) == {1}
        pool(ray).run(tasks, lambda result, losses: found.append(result), lost)
    assert sorted(found) == [2 * task for task in range(60)]
    assert sorted((task, losses) for task, losses, _ in ended) == [(-2, 2), (-1, 2)]
    assert next(why for task, _, why in ended if task == -2) == "this task cannot be done"


def test_what_no_worker_can_do(cluster: Any) -> None:
    with connected(cluster.address) as ray:
        with pytest.raises(Error, match=r"a node has ortlm 0\.0, and this is"):
            pool(ray, "0.0").run([1], lambda *_: None, lambda *_: [])
        with pytest.raises(BadArtifact, match="it is damaged"):
            pool(ray, "", BadArtifact("it is damaged")).run([1], lambda *_: None, lambda *_: [])
        with pytest.raises(Error, match="no node of the cluster has 2 processors"):
            pool(ray, cpus=2).run([1], lambda *_: None, lambda *_: [])


def test_no_cluster() -> None:
    pytest.importorskip("ray")
    with (
        pytest.raises(BadOption, match=r"--ray 127\.0\.0\.1:1: there is no cluster of Ray"),
        connected("127.0.0.1:1"),
    ):
        pass


def test_a_model_is_taken_from_its_place_or_copied(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = Model.of(trained)
    assert model.digest == model_digest(trained, trust=False)
    assert folder_of(model, None, bytes) == trained.resolve()
    elsewhere = Model(str(tmp_path / "nowhere"), model.digest)
    with pytest.raises(NoModel, match="nowhere is not there on"):
        folder_of(elsewhere, None, bytes)
    pieces = put_pieces(trained, lambda piece: piece)
    copy = folder_of(elsewhere, pieces, lambda piece: piece)
    assert copy == tmp_path / "ortlm" / "nodes" / model.digest[:40]
    assert model_digest(copy, trust=False) == model.digest
    # What is there already is not fetched again.
    assert folder_of(elsewhere, pieces, lambda piece: pytest.fail("fetched twice")) == copy
    other = Model(str(trained), "0" * 64)
    with pytest.raises(NoModel, match="holds another model on"):
        folder_of(other, None, bytes)
    with pytest.raises(BadArtifact, match=r"has the SHA-256 .* instead of 000000000000"):
        folder_of(other, pieces, lambda piece: piece)
    assert [path.name for path in copy.parent.iterdir() if path.is_dir()] == [copy.name]


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        BadOption, match=r"--ray needs ray, which is not installed: pip install 'ortlm\[ray\]'"
    ):
        import_ray()
