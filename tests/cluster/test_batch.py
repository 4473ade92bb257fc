"""A batch on a cluster: nodes and the process that asked may end, and every row has its one result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from ortlm.batch.cluster import answer_on
from ortlm.batch.run import BatchOptions, run_batch
from ortlm.cluster.model_files import Model, model_digest
from ortlm.errors import BadOption
from tests.batch.conftest import Silent, mixed, results, said
from tests.cluster.conftest import NODE


def answers(folder: Path) -> dict[str, str]:
    return {name: said(row) for name, row in results(folder).items()}


def test_a_node_and_the_driver_are_killed(
    cluster: Any, options: Callable[..., BatchOptions], tmp_path: Path
) -> None:
    rows = [*mixed(400), "no json"]
    wanted = options(rows, batch=2)
    local = replace(wanted, output=tmp_path / "local", batch=8)
    run_batch(local, Silent())
    command = [
        sys.executable, "-m", "ortlm", "batch", wanted.model, "-i", str(wanted.input), "-o", str(wanted.output),
        "--threads", "1", "--batch-size", "2", "--ray", cluster.address,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    shard = wanted.output / "output-00001.jsonl"
    until = time.monotonic() + 300

    def wait_for(count: int) -> None:
        while not (shard.exists() and shard.read_bytes().count(b"\n") >= count):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)

    node = cluster.add_node(**NODE)
    wait_for(60)
    cluster.remove_node(node, allow_graceful=False)
    wait_for(160)
    process.kill()
    process.wait()
    assert shard.read_bytes().count(b"\n") < 400
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)
    assert len(results(wanted.output, "errors")) == 1
    assert answers(wanted.output).keys() == {f"r{i}" for i in range(400)}
    assert answers(wanted.output) == answers(local.output)
    counts = json.loads((wanted.output / "batch.json").read_text())["counts"]
    assert (counts["done"], counts["failed"]) == (401, 1)


def test_a_model_that_nodes_lack_is_copied(
    cluster: Any, options: Callable[..., BatchOptions], trained: Path, tmp_path: Path
) -> None:
    wanted = options(mixed(12), batch=2)
    nowhere = Model(str(tmp_path / "nowhere"), model_digest(trained))
    run_batch(wanted, Silent(), partial(answer_on, cluster.address, wanted, shared=nowhere))
    local = replace(wanted, output=tmp_path / "local")
    run_batch(local, Silent())
    assert answers(wanted.output) == answers(local.output)
    assert len(answers(wanted.output)) == 12


def test_devices_are_refused(options: Callable[..., BatchOptions]) -> None:
    wanted = options(mixed(1), machine={"device": "cuda"})
    with pytest.raises(BadOption, match="--ray runs on CPUs only, and --device is cuda"):
        answer_on("local", wanted, iter(()), lambda result: None)
