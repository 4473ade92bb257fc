"""The results folder holds exactly one result for each row, whatever ends a run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from ortlm.batch import results as module
from ortlm.batch.answering import Result
from ortlm.batch.results import BATCH_FILE, Identity, Results
from ortlm.errors import BadOption, Error


def identity(input_hash: str = "a" * 64, model: str = "b" * 64, device: str | None = None) -> Identity:
    return Identity(
        {"name": "in.jsonl", "sha256": input_hash}, {"name": "tiny", "sha256": model}, {"device": device}
    )


def result(number: int, *, failed: bool = False) -> Result:
    return Result(number, {"custom_id": f"r{number}", "response": None, "error": None}, failed, 3, 2)


def put(folder: Path, numbers: Sequence[int], rows: int = 20, **how: Any) -> Results:
    with Results(folder, identity(**how), rows) as results:
        for number in numbers:
            results.put(result(number, failed=number % 5 == 4))
    return results


def names(folder: Path, kind: str = "output") -> list[str]:
    return [row["custom_id"] for row in module.shards_of(folder, kind)]


def test_results_and_errors(tmp_path: Path) -> None:
    put(tmp_path / "new" / "out", range(10))
    folder = tmp_path / "new" / "out"
    assert names(folder) == ["r0", "r1", "r2", "r3", "r5", "r6", "r7", "r8"]
    assert names(folder, "errors") == ["r4", "r9"]
    assert json.loads((folder / BATCH_FILE).read_text())["counts"] == {
        "rows": 20, "done": 10, "failed": 2, "retries": 0, "prompt_tokens": 30, "new_tokens": 20,
    }  # fmt: skip
    later = put(folder, range(10, 20))
    assert (later.resumed, later.counts.done, later.counts.failed) == (10, 20, 4)
    assert not later.is_left(20)


def test_files_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 3)
    put(tmp_path, [0, 1, 2, 3])
    put(tmp_path, [5, 6, 7, 8])
    put(tmp_path, [10])
    files = sorted(path.name for path in tmp_path.glob("output-*"))
    assert files == ["output-00001.jsonl", "output-00002.jsonl", "output-00003.jsonl"]
    assert [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("output-*"))] == [3, 3, 3]
    assert put(tmp_path, []).counts.done == 9
    (tmp_path / "output-00002.jsonl").unlink()
    with pytest.raises(BadOption, match=r"output-00002\.jsonl is missing"):
        put(tmp_path, [])


@pytest.mark.parametrize(
    "torn", [b'{"id":"batch_req', b"\0\0\0\0\n", b'{"id":"batch_req_0123456789ab_7","x":1\n']
)
def test_a_torn_end_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    put(tmp_path, [0, 1, 2])
    with (tmp_path / "output-00001.jsonl").open("ab") as stream:
        stream.write(torn)
    assert put(tmp_path, [3]).counts.done == 4
    assert names(tmp_path) == ["r0", "r1", "r2", "r3"]


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, [0])
    write = os.write

    def full(handle: int, data: Any) -> int:
        if len(data) > 10:
            return write(handle, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(
            os, "write", lambda handle, data: full(handle, data) if len(data) > 10 else full(handle, b"")
        )
        with pytest.raises(OSError, match="No space left") as raised:
            put(tmp_path, [1])
    assert str(tmp_path / "output-00001.jsonl") in str(raised.value)
    assert put(tmp_path, [1, 2]).counts.done == 3
    assert names(tmp_path) == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"input_hash": "c" * 64}, "holds results of another input: in.jsonl with SHA-256 aaaaaaaaaaaa"),
        ({"model": "c" * 64}, "holds results of another model: tiny with SHA-256 bbbbbbbbbbbb"),
        ({"device": "cuda"}, "holds results with device None, and now it is cuda"),
    ],
)
def test_whose_folder_it_is(tmp_path: Path, how: dict[str, Any], said: str) -> None:
    put(tmp_path, [0])
    with pytest.raises(BadOption, match=said):
        put(tmp_path, [1], **how)
    assert names(tmp_path) == ["r0"]


def test_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadOption, match=r"holds other files and no batch\.json"):
        put(tmp_path, [0])


def test_two_runs_at_once(tmp_path: Path) -> None:
    with Results(tmp_path, identity(), 5), pytest.raises(Error, match="another run writes to"):
        put(tmp_path, [0])
    assert put(tmp_path, [0]).counts.done == 1


def test_a_row_has_one_result(tmp_path: Path) -> None:
    with pytest.raises(Error, match="row 1 has two results"):
        put(tmp_path, [0, 1, 1])
    path = tmp_path / "output-00001.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(BadOption, match="has a second result of row 0"):
        put(tmp_path, [])


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        put(tmp_path / "file" / "results", [0])
