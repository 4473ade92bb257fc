"""Requests are read row by row, whatever a file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from ortlm.batch import rows
from ortlm.batch.rows import read, survey
from ortlm.errors import BadOption, Error
from tests.batch.conftest import request, write


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"custom_id":"a"}\r\n\n   \nno json\n{"custom_id":"b"}')
    found = survey(path)
    assert (found.rows, found.bytes, found.repeated) == (3, path.stat().st_size, {})
    assert [(row.number, row.line, row.text) for row in read(found)] == [
        (0, 1, b'{"custom_id":"a"}\r\n'),
        (1, 4, b"no json\n"),
        (2, 5, b'{"custom_id":"b"}'),
    ]


def test_repeated_names_point_to_the_first(tmp_path: Path) -> None:
    names = ["a", "b", "a", "c", "b", "a", 7, 7, ""]
    found = survey(write(tmp_path / "in.jsonl", [{"custom_id": name} for name in names]))
    assert found.repeated == {2: 1, 4: 2, 5: 1}
    assert [row.first_line for row in read(found)] == [None, None, 1, None, 2, 1, None, None, None]


def test_a_line_too_long_costs_no_memory_and_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(rows, "_SKIPPED_BYTES", 16)
    path = write(tmp_path / "in.jsonl", [{"custom_id": "a"}, "x" * 1000, "y" * 101, {"custom_id": "b"}])
    found = survey(path)
    assert [(row.line, row.text is None) for row in read(found)] == [
        (1, False), (2, True), (3, True), (4, False),
    ]  # fmt: skip
    import hashlib

    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(BadOption, match=r"in\.jsonl holds no request"):
        survey(tmp_path / "in.jsonl")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="is no file"):
        survey(tmp_path)
    with pytest.raises(BadOption, match="does not exist"):
        survey(tmp_path / "nothing")


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"custom_id": "a"}, {"custom_id": "b"}])
    found = survey(path)
    write(path, [{"custom_id": "a"}, {"custom_id": "c"}])
    with pytest.raises(Error, match="was changed while"):
        list(read(found))


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet(tmp_path: Path, as_struct: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    wanted = [request(f"r{i}", "/v1/completions", prompt="x" * i) for i in range(150)]
    bodies = [row["body"] if as_struct else json.dumps(row["body"]) for row in wanted]
    table = pyarrow.table(
        {"custom_id": [r["custom_id"] for r in wanted], "url": [r["url"] for r in wanted], "body": bodies}
    )
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=50)
    found = survey(tmp_path / "in.parquet")
    assert found.rows == 150
    assert [json.loads(row.text or b"") for row in read(found)] == wanted


def test_bad_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"custom_id": ["a"], "text": ["b"]}), path)
    with pytest.raises(BadOption, match="has no column url, body"):
        survey(path)
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(BadOption, match="cannot be read as Parquet"):
        survey(path)
    parquet.write_table(pyarrow.table({"custom_id": ["a"], "url": ["u"], "body": ["{no json"]}), path)
    (row,) = read(survey(path))
    assert row.text is not None
    assert b"{no json" in row.text
