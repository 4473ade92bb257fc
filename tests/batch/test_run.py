"""A batch of requests to a real model: each is answered as the server would, or has its error row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

import ortlm
from ortlm.batch.results import BATCH_FILE
from ortlm.batch.run import BatchOptions, run_batch
from ortlm.cli import main
from ortlm.errors import BadOption
from tests.batch.conftest import Silent, mixed, request, results, said, write
from tests.serving.alone import says_alone


def test_answers_are_those_of_single_requests(
    options: Callable[..., BatchOptions], lm: ortlm.LanguageModel
) -> None:
    rows = mixed(60)
    wanted = options(rows)
    counts = run_batch(wanted, Silent())
    assert (counts.done, counts.failed) == (60, 0)
    found = results(wanted.output)
    assert found.keys() == {row["custom_id"] for row in rows}
    for row in rows:
        body = row["body"]
        prompt = body["prompt"] if "prompt" in body else body["messages"]
        alone = says_alone(lm, prompt, max_new_tokens=body["max_tokens"], temperature=0)
        assert said(found[row["custom_id"]]) == alone.text
    one = found["r1"]
    assert one.keys() == {"id", "custom_id", "response", "error"}
    assert one["response"]["status_code"] == 200
    assert one["response"]["request_id"].startswith("req_")
    assert one["response"]["body"]["usage"]["total_tokens"] > 0


def test_embeddings(options: Callable[..., BatchOptions], lm: ortlm.LanguageModel) -> None:
    wanted = options([request("e", "/v1/embeddings", input=["import os", "def"])])
    run_batch(wanted, Silent())
    data = results(wanted.output)["e"]["response"]["body"]["data"]
    assert [entry["embedding"] for entry in data] == lm.embed(["import os", "def"], batch=1).tolist()


def good(name: str = "good") -> dict[str, Any]:
    return request(name, "/v1/completions", prompt="import", max_tokens=2, temperature=0)


BAD: list[tuple[Any, Any, str | None, str]] = [
    # the row, its custom_id in the result, code or status, what the message says
    ("no json", None, "invalid_json", "line 2 is no valid JSON"),
    ("[1]", None, "invalid_json", "expected an object"),
    ('{"custom_id": "x", "url"', None, "invalid_json", "line 2 is no valid JSON"),
    ({**good(), "custom_id": 5}, None, "invalid_custom_id", "custom_id must be a text, found 5"),
    ({"method": "POST"}, None, "invalid_custom_id", "found null"),
    (good("first"), None, "duplicate_custom_id", "is that of line 1 already"),
    ({**good("x"), "method": "GET"}, "x", "invalid_method", "method must be POST, found 'GET'"),
    ({**good("x"), "url": "/v1/chat"}, "x", "unknown_url", "url is '/v1/chat'; there is /v1/chat/completions"),
    ({**good("x"), "params": 1}, "x", "unknown_field", "'params' is no field of a request"),
    ({**good("x"), "body": "text"}, "x", "invalid_body", "body must be an object"),
    (request("x", "/v1/completions", prompt="a", model="gpt"), "x", 404, "there is no model 'gpt'; there is tiny"),
    (request("x", "/v1/completions"), "x", 400, "prompt: Field required"),
    (request("x", "/v1/completions", prompt="a", stream=True), "x", 400, "stream is not available in a batch"),
    (request("x", "/v1/completions", prompt="a", tempreature=0), "x", 400, "tempreature is not supported"),
    (request("x", "/v1/completions", prompt="import os " * 3000), "x", 400, "but the context holds"),
    (request("x", "/v1/completions", prompt="a", max_tokens=10**6), "x", 400, "but the context holds"),
    (request("x", "/v1/completions", prompt="NotImplementedError " * (1 << 19)), "x", 400, ""),
    (request("x", "/v1/chat/completions", messages=[]), "x", 400, "messages"),
    (request("x", "/v1/embeddings", input=[]), "x", 400, "input has 0 texts"),
    (request("x", "/v1/embeddings", input="a", model="tiny:none"), "x", 404, "there is no model"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "code", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_row_has_its_error_and_nothing_else_changes(
    options: Callable[..., BatchOptions], row: Any, name: str | None, code: Any, message: str
) -> None:
    wanted = options([good("first"), row, good("last")])
    counts = run_batch(wanted, Silent())
    assert (counts.done, counts.failed) == (3, 1)
    assert results(wanted.output).keys() == {"first", "last"}
    ((found_name, error),) = results(wanted.output, "errors").items()
    assert found_name == name
    if isinstance(code, int):
        assert error["error"] is None
        assert error["response"]["status_code"] == code
        assert message in error["response"]["body"]["error"]["message"]
    else:
        assert error["response"] is None
        assert (error["error"]["code"], error["error"]["line"]) == (code, 2)
        assert message in error["error"]["message"]


def test_a_limit_that_grows(options: Callable[..., BatchOptions]) -> None:
    wanted = options(mixed(12), limit=5)
    assert run_batch(wanted, Silent()).done == 5
    assert results(wanted.output).keys() == {f"r{i}" for i in range(5)}
    watcher = Silent()
    assert run_batch(replace(wanted, limit=None), watcher).done == 12
    assert watcher.before == 5
    assert json.loads((wanted.output / BATCH_FILE).read_text())["counts"]["done"] == 12


def test_another_input_is_refused(options: Callable[..., BatchOptions]) -> None:
    run_batch(options(mixed(2)), Silent())
    with pytest.raises(BadOption, match="holds results of another input"):
        run_batch(options(mixed(3)), Silent())
    other = replace(options(mixed(2)), model=f"other={options([]).model.partition('=')[2]}")
    write(other.input, mixed(2))
    with pytest.raises(BadOption, match="holds results of another model: tiny"):
        run_batch(other, Silent())


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_killed_run_is_resumed(
    options: Callable[..., BatchOptions], tmp_path: Path, number: signal.Signals
) -> None:
    rows = mixed(150)
    wanted = options(rows)
    command = [
        sys.executable, "-m", "ortlm", "batch", wanted.model, "-i", str(wanted.input), "-o", str(wanted.output),
        "--threads", "1", "--batch-size", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    shard = wanted.output / "output-00001.jsonl"
    until = time.monotonic() + 60
    while not (shard.exists() and shard.read_bytes().count(b"\n") >= 20):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(number)
    _, told = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "of 150 rows have their results. The same command resumes." in told
    done = shard.read_bytes()
    assert done.count(b"\n") < 150
    # As if the disk had got half of a line.
    os.truncate(shard, len(done) - 7)
    watcher = Silent()
    counts = run_batch(wanted, watcher)
    assert 19 <= watcher.before < 150
    assert counts.done == 150
    at_once = replace(wanted, output=tmp_path / "at-once", batch=8)
    run_batch(at_once, Silent())
    found, whole = results(wanted.output), results(at_once.output)
    assert {name: said(row) for name, row in found.items()} == {
        name: said(row) for name, row in whole.items()
    }
    assert len(found) == 150


def test_the_command(
    options: Callable[..., BatchOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = options([*mixed(5), "no json"])
    command = ["batch", wanted.model, "-i", str(wanted.input), "-o", str(wanted.output), "--threads", "1"]
    assert main(command) == 0
    assert "6 results, 1 of them errors; 6 in 0:00:0" in capsys.readouterr().err
    assert main([*command, "--device", "cpu"]) == 2
    assert "holds results with device None, and now it is cpu" in capsys.readouterr().err
    assert main([*command, "-o", str(wanted.input)]) == 1
    assert str(wanted.input) in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "other"), "--limit", "0"]) == 2
    assert "--limit must be at least 1" in capsys.readouterr().err
    wanted.input.write_text("")
    assert main(command) == 2
    assert "holds no request" in capsys.readouterr().err


def test_the_command_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import builtins

    usual = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "ortlm.batch.run":
            raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["batch", "nothing", "-i", "a", "-o", "b"]) == 2
    assert "needs pydantic, which is not installed: pip install 'ortlm[batch]'" in capsys.readouterr().err
