"""Strangers' JSON: what is refused, how it is told, and what a field takes."""

from __future__ import annotations

import os

import pytest

from ortlm._utils.checked_json import (
    check,
    flag,
    integer,
    list_of,
    number,
    object_of,
    one_of,
    parse,
    read_object,
    table,
    text,
)
from ortlm.errors import BadArtifact, BadCheckpoint, BadOption


@pytest.mark.parametrize("error", [BadArtifact, BadOption, BadCheckpoint])
def test_files_that_are_none(tmp_path, error):
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=r"folder"):
        read_object(tmp_path / "folder", limit=10, error=error)
    with pytest.raises(error, match=r"nowhere cannot be read: No such file or directory\."):
        read_object(tmp_path / "nowhere", limit=10, error=error)
    with pytest.raises(error, match="cannot be read"):
        read_object("a\0b", limit=10, error=error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(BadArtifact, match="is not a regular file"):
            read_object(path, limit=10, error=BadArtifact)


def test_sizes(tmp_path):
    (tmp_path / "x").write_text('{"a": 1}')
    assert read_object(tmp_path / "x", limit=8, error=BadArtifact) == {"a": 1}
    with pytest.raises(BadArtifact, match="more than 7 bytes"):
        read_object(tmp_path / "x", limit=7, error=BadArtifact)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadArtifact, match="more than 1,000 bytes"):
        read_object(tmp_path / "sparse", limit=1_000, error=BadArtifact)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": "\xff"}', "is not UTF-8: byte 7 is 0xff"),
        (b"[1]", "must hold a JSON object"),
        (b"", "cannot be read as JSON"),
        (b'{"a": NaN}', "no finite number"),
        (b'{"a": [{"b": -Infinity}]}', "no finite number"),
        (b'{"a": 1e400}', "no finite number"),
        (b'{"a": 1' + b"0" * 400 + b"}", "is too large"),
        (b'{"a": 1' + b"0" * 5_000 + b"}", "cannot be read as JSON"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "nested deeper than 100"),
        (b'{"a": ' * 100_000, "nested deeper than 100"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": {"b": 1, "b": true}}', "'b' is given twice"),
    ],
)
def test_contents(tmp_path, raw, message):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(BadArtifact, match=message) as caught:
        read_object(tmp_path / "x.json", limit=1 << 20, error=BadArtifact)
    assert "x.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_fine():
    found = parse('\n{"a": 1, "a": 1, "b": 9223372036854775807, "c": 1e308}', where="x", error=BadArtifact)
    assert found == {"a": 1, "b": 2**63 - 1, "c": 1e308}
    # Tokenizers of Hugging Face write such a number for "no limit".
    assert parse("1000000000000000019884624838656", where="x", error=BadArtifact) == 1e30


FIELDS = {
    "layers": integer(1, 100),
    "theta": number(0, 1e9, default=1e4),
    "tied": flag(default=False),
    "name": text(longest=5, default=""),
    "kind": one_of("grow", "window", default="grow"),
    "ids": list_of(integer(0, 10), most=3, default=()),
    "files": object_of(text(), default=None),
    "inner": table({"a": integer()}, unknown="refuse", default=None),
}


def checked(found, **options):
    return check(found, FIELDS, file="c.json", error=BadArtifact, **options)


def test_defaults():
    assert checked({"layers": 2, "name": None, "other": 1}) == {
        "layers": 2, "theta": 1e4, "tied": False, "name": "", "kind": "grow", "ids": (),
        "files": None, "inner": None,
    }  # fmt: skip
    assert checked({"layers": 2, "other": 1}, unknown="keep")["other"] == 1


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "c.json: layers is missing, expected a whole number from 1 to 100"),
        ({"layers": None}, "layers is missing"),
        ({"layers": 0}, "layers is 0, expected a whole number from 1 to 100"),
        ({"layers": 101}, "layers is 101"),
        ({"layers": 2.0}, "layers is 2.0"),
        ({"layers": True}, "layers is True"),
        ({"layers": "2"}, "layers is '2'"),
        ({"layers": 2, "theta": -1}, "theta is -1"),
        ({"layers": 2, "theta": 10**400}, "theta is a whole number of 1,329 bits"),
        ({"layers": 2, "tied": 0}, "tied is 0, expected true or false"),
        ({"layers": 2, "name": "\x1b[2Jab"}, "name is '.x1b"),
        ({"layers": 2, "kind": 5}, 'kind is 5, expected one of "grow", "window"'),
        ({"layers": 2, "ids": [1, 2, 11]}, r"ids\[2\] is 11"),
        ({"layers": 2, "ids": [1, 2, 3, 4]}, "expected a list"),
        ({"layers": 2, "files": {"a": 1}}, "files.a is 1, expected a string"),
        ({"layers": 2, "inner": {"b": 1}}, "inner.b is not allowed here. Allowed: a"),
        ({"layers": 2, "inner": []}, "inner is .., expected an object"),
        ({"layers": 2, "inner": {"a": [0] * 10**6}}, r"\(1,000,000 entries\)"),
    ],
)
def test_values(found, message):
    with pytest.raises(BadArtifact, match=message) as caught:
        checked(found)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_unknown_keys():
    with pytest.raises(BadArtifact, match=r"layer is not allowed here.*Did you mean: layers\?"):
        checked({"layer": 1, "layers": 1}, unknown="refuse")
