"""The reader of all of strangers' JSON: any bytes give a value or the error that was asked for."""

from __future__ import annotations

import json

from ortlm._utils import checked_json
from ortlm.errors import BadArtifact
from tests.fuzz.harness import damaged_bytes, damaged_json, fuzz

VALID = {"a": 1, "b": [1.5, None, True, {"c": "text"}], "d": {"e": -3, "f": ["x", "y"]}, "g": "é\n"}
FIELDS = {
    "a": checked_json.integer(0, 10),
    "b": checked_json.list_of(checked_json.anything(default=None)),
    "d": checked_json.table(
        {"e": checked_json.number(-5, 5), "f": checked_json.list_of(checked_json.text(longest=10), most=5)}
    ),
    "g": checked_json.text(default="none"),
}


@fuzz(damaged_bytes(json.dumps(VALID).encode()))
def test_bytes(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    checked_json.read_object(tmp_path / "x.json", limit=10_000, error=BadArtifact)


@fuzz(damaged_json(VALID))
def test_values(found):
    text = json.dumps(found, ensure_ascii=True)
    read = checked_json.parse_object(text, where="x.json", error=BadArtifact)
    values = checked_json.check(read, FIELDS, file="x.json", error=BadArtifact, unknown="refuse")
    assert type(values["a"]) is int
    assert 0 <= values["a"] <= 10
    assert all(len(entry) <= 10 for entry in values["d"]["f"])
