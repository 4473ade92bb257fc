"""What comes over the network: bad bodies, keys, disconnects, overload, signals."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ortlm
from tests.server.conftest import Running

pytest.importorskip("fastapi")
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]


def call(url: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Return status, headers and body of an answer; ``body`` is sent as it is if it is bytes."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=data, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            text, status, given = found.read(), found.status, found.headers
    except urllib.error.HTTPError as error:
        text, status, given = error.read(), error.code, error.headers
    kind = given.get("content-type", "")
    return status, given, json.loads(text) if kind.startswith("application/json") else text.decode()


BAD = {
    "nothing": b"",
    "no json": b"{",
    "no utf-8": b'{"model": "\xff"}',
    "a list": b"[]",
    "deep": b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nan": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "huge number": b'{"prompt": [' + b"9" * 5000 + b"]}",
    "big id": b'{"prompt": [99999999999999999999]}',
    "negative": b'{"prompt": [-1]}',
    "no role": b'{"messages": [{}]}',
    "null": b'{"messages": null, "prompt": null}',
}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/tokenize",
    ],
)
@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(live: Running, path: str, name: str) -> None:
    status, _, answer = call(live.url + path, BAD[name])
    assert status == 400, answer
    if path != "/v1/messages":
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"


SAID = [{"role": "user", "content": "x"}]


def said(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


FILE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
ODD = [
    ("/v1/messages", {"max_tokens": 4, "messages": SAID, "tools": [{"name": "a b", "input_schema": {}}]}),
    ("/v1/messages", {"max_tokens": 4, "messages": said({"type": "image", "source": 3})}),
    ("/v1/messages", {"max_tokens": 4, "messages": said({"type": "tool_result"}, 3)}),
    ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "tool", "content": "x"}]}),
    ("/v1/responses", {"input": [{"type": "message"}]}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}),
    ("/v1/responses", {"input": [{"type": "function_call_output", "output": {}}]}),
    ("/v1/responses", {"input": [], "text": {"format": {"type": "json_schema"}}}),
    ("/v1/chat/completions", {"messages": said(FILE)}),
    ("/v1/chat/completions", {"messages": SAID, "chat_template_kwargs": {"messages": 3}, "max_tokens": 2}),
    ("/v1/completions", {"prompt": "x", "stop": ["y"] * 1000}),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"99999999": 1}}),
    ("/v1/completions", {"prompt": ["x"] * 1000}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**30}),
    ("/v1/completions", {"prompt": "x", "seed": 10**30, "max_tokens": 1}),
    ("/tokenize", {"prompt": "x", "content": "y"}),
    ("/detokenize", {"tokens": [10**9]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), ODD, ids=[str(number) for number in range(len(ODD))])
def test_nothing_makes_the_server_fail(live: Running, path: str, body: Any) -> None:
    status, _, answer = call(live.url + path, body)
    assert status < 500, answer


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FORMS = {"type": "json_object", "schema": {"type": "object"}}
# What must not be passed over, and the name that the answer gives.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"response_format": FORMS}, "response_format.schema"),
    (CHAT, {"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format"),
    (CHAT, {"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}, "odd": 1}]}, "tools.0.odd"),
    (CHAT, {"n": 100}, "n"),
    (TEXT, {"prompt": ["x"] * 100}, "prompt"),
    (CHAT, {"temperature": 0, "top_p": 7}, "top_p"),
    (CHAT, {"temperature": 0, "seed": 3, "top_k": -4}, "top_k"),
    (CHAT, {"min_tokens": 30, "max_tokens": 3}, "min_tokens"),
    (CHAT, {"seed": -(10**30)}, "seed"),
    (CHAT, {"messages": [{"role": "bogus", "content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [*SAID, {"role": "tool", "content": "x"}]}, "messages.1"),
    (CHAT, {"messages": [*SAID, {"role": "assistant", "tool_calls": [CALL]}]}, "messages.1"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages.0"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    (TEXT, {"prompt": "word " * 2000}, "prompt"),
    ("/v1/responses", {"text": {"format": FORMS}}, "text.format.schema"),
    ("/v1/responses", {"input": [{"type": "function_call", "arguments": "{}"}]}, "messages.0"),
    ("/tokenize", {"messages": [{"role": "bogus", "content": "x"}]}, "messages.0.role"),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED, ids=[str(at) for at in range(len(REFUSED))])
def test_nothing_is_passed_over(live: Running, path: str, body: dict[str, Any], param: str) -> None:
    usual: dict[str, Any] = {
        CHAT: {"messages": SAID},
        TEXT: {"prompt": "x"},
        "/v1/responses": {"input": "x"},
    }.get(path, {})
    status, _, answer = call(live.url + path, {**usual, **body})
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_numbers_that_are_no_json(live: Running) -> None:
    """Not even where any value may stand, such as the parameters of a tool, which an answer repeats."""
    tools = b'{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": NaN}}]}'
    status, _, answer = call(f"{live.url}/v1/responses", tools)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_answers_do_not_say_where_files_are(
    live: Running, lm: ortlm.LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    status, _, answer = call(live.url + CHAT, {"messages": said(image)})
    assert (status, answer["error"]["message"].partition(":")[0]) == (400, "tiny is a text model")

    from ortlm.errors import BadArtifact
    from ortlm.serving.batch import Batch

    for error in (BadArtifact("/secret/model.onnx is missing."), OSError("/secret/model.onnx")):

        def step(*_: Any, error: Exception = error) -> Any:
            raise error

        for stream in (False, True):
            monkeypatch.setattr(Batch, "step", step)
            status, _, answer = call(live.url + TEXT, {"prompt": "x", "max_tokens": 3, "stream": stream})
            monkeypatch.undo()
            assert (status, "/secret" in str(answer)) == (200 if stream else 500, False)
            assert "its log says why" in str(answer)
            assert "/secret" in caplog.text
            caplog.clear()


def test_bytes_of_tokens_that_are_parts_of_characters(live: Running, lm: ortlm.LanguageModel) -> None:
    face = "\N{GRINNING FACE}"
    ids = lm.tokenizer.encode(face, add_special_tokens=False)
    assert len(ids) > 1
    body = {"messages": SAID, "max_tokens": 1, "temperature": 0, "logprobs": True}
    found = b""
    for token in ids:
        _, _, answer = call(live.url + CHAT, {**body, "logit_bias": {str(token): 100}})
        found += bytes(answer["choices"][0]["logprobs"]["content"][0]["bytes"])
    assert found.decode() == face


def test_unknown_paths_and_methods(live: Running) -> None:
    assert call(f"{live.url}/v1/nothing")[0] == 404
    status, headers, answer = call(f"{live.url}/v1/chat/completions")
    assert (status, "method" in answer["error"]["message"]) == (405, True)
    assert headers["allow"] == "POST"


def test_bodies_have_a_limit(serve: Callable[..., Any]) -> None:
    from ortlm.server.app import ServerOptions

    with serve(options=ServerOptions(body_bytes=1000)) as live:
        status, _, answer = call(f"{live.url}/v1/completions", {"prompt": "x" * 2000})
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        status, _, answer = call(f"{live.url}/v1/messages", {"system": "x" * 2000})
        assert (status, answer["type"], answer["error"]["type"]) == (413, "error", "request_too_large")
        # In chunks, without a length.
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(3):
                line.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n")
            assert b" 413 " in line.recv(1000)


def test_clients_that_stop_within_a_body(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """They are not waited for, and nothing of it is a fault."""
    from ortlm.server.app import ServerOptions

    with serve(options=ServerOptions(body_seconds=0.2)) as live:
        host, port = live.url.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head)
            assert b" 408 " in line.recv(1000)
        with caplog.at_level("INFO", logger="ortlm.server.requests"):
            with socket.create_connection((host, int(port))) as line:
                line.sendall(head)
            for _ in range(1000):
                if "/v1/completions" in caplog.text:
                    break
                time.sleep(0.01)
            assert "/v1/completions" in caplog.text
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        # An answer may take longer than a piece of a body.
        body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True}
        assert call(f"{live.url}/v1/completions", body)[0] == 200


def test_keys(serve: Callable[..., Any]) -> None:
    from ortlm.server.app import ServerOptions

    with serve(options=ServerOptions(keys=["one", " two", "схем"])) as live:
        url = f"{live.url}/v1/models"
        for headers in ({}, {"authorization": "Bearer three"}, {"x_api_key": "on"}, {"authorization": "one"}):
            status, _, answer = call(url, **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        status, _, answer = call(f"{live.url}/v1/messages", {})
        assert (status, answer["type"], answer["error"]["type"]) == (401, "error", "authentication_error")
        for headers in (
            {"authorization": "Bearer one"},
            {"authorization": "bearer two"},
            {"x_api_key": "two"},
            # As it stands in a file, which is UTF-8.
            {"x_api_key": "схем".encode().decode("latin-1")},
        ):
            assert call(url, **headers)[0] == 200
        assert call(f"{live.url}/health")[0] == 200
        assert call(f"{live.url}/metrics")[0] == 401


def test_origins_are_named(serve: Callable[..., Any]) -> None:
    from ortlm.server.app import ServerOptions

    with serve(options=ServerOptions(origins=["https://a.example"], page=False)) as live:
        status, _, answer = call(f"{live.url}/v1/messages", {}, origin="https://b.example")
        assert (status, answer["error"]["type"]) == (403, "permission_error")
        _, headers, _ = call(f"{live.url}/health", origin="https://a.example")
        assert headers["access-control-allow-origin"] == "https://a.example"
        status, headers, answer = call(f"{live.url}/health", origin="https://b.example")
        assert (status, answer["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in headers
        # A form of a page is sent before a browser asks, and so are requests without a type of their own.
        body = {"prompt": "x", "max_tokens": 1}
        for origin in ("null", live.url):
            assert (
                call(f"{live.url}/v1/completions", body, origin=origin, content_type="text/plain")[0] == 403
            )
        asked = urllib.request.Request(
            f"{live.url}/v1/completions",
            method="OPTIONS",
            headers={
                "origin": "https://a.example",
                "access-control-request-headers": "x-stainless-os, authorization",
            },
        )
        with urllib.request.urlopen(asked) as found:
            assert found.headers["access-control-allow-headers"] == "x-stainless-os, authorization"


def test_tokens(live: Running, lm: ortlm.LanguageModel) -> None:
    """Under the names of vLLM and of llama.cpp."""
    ids = lm.encode("import os")
    for name in ("prompt", "content"):
        found = call(f"{live.url}/tokenize", {name: "import os"})[2]
        assert found == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    found = call(f"{live.url}/tokenize", {"messages": HELLO})[2]
    assert found["tokens"] == lm.encode(HELLO)
    assert call(f"{live.url}/detokenize", {"tokens": ids})[2] == {
        "prompt": "import os",
        "content": "import os",
    }
    info = call(f"{live.url}/tokenizer_info")[2]
    assert info["eos_token"] == lm.tokenizer.special_tokens["eos_token"]
    assert "<|user|>" in info["chat_template"]


def test_metrics(live: Running) -> None:
    call(f"{live.url}/v1/completions", {"prompt": "import os", "max_tokens": 3, "temperature": 0})
    text = call(f"{live.url}/metrics")[2]
    for name in (
        "num_requests_running",
        "kv_cache_usage_perc",
        "generation_tokens_total",
        "prefix_cache_hits_total",
    ):
        assert re.search(rf'^ortlm:{name}{{model_name="tiny"}} \d', text, re.MULTILINE), name
    assert 'ortlm:time_to_first_token_seconds_bucket{le="0.005",model_name="tiny"}' in text
    assert re.search(
        r'ortlm:request_success_total{finished_reason="(length|stop)",model_name="tiny"} [1-9]', text
    )


def test_the_log_holds_figures_and_no_text(
    live: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_log = logging.getLogger("ortlm.server.requests")
    # Whatever commands have set up that other tests run in this process.
    monkeypatch.setattr(request_log, "handlers", [])
    monkeypatch.setattr(request_log, "propagate", True)
    found: list[dict[str, Any]] = []
    with caplog.at_level("INFO", logger=request_log.name):
        body = {"prompt": "import secret_word", "max_tokens": 3, "temperature": 0}
        _, headers, _ = call(f"{live.url}/v1/completions", body, x_request_id="mine-1")
        for _ in range(500):
            # The line is written after the answer.
            lines = [json.loads(record.message) for record in caplog.records]
            found = [line for line in lines if line["request_id"] == "mine-1"]
            if found:
                break
            time.sleep(0.01)
    assert headers["x-request-id"] == "mine-1"
    (line,) = found
    assert line["path"] == "/v1/completions"
    assert line["status"] == 200
    assert line["new_tokens"] == 3
    assert "secret_word" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(live: Running, stream: bool) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"prompt": "import os", "max_tokens": 500, "ignore_eos": True, "stream": stream}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head + body)
        while not live.stats.running:
            time.sleep(0.002)
        before = live.stats.new_tokens
    live.wait_until_idle()
    assert live.stats.new_tokens - before < 490


def test_overload(serve: Callable[..., Any]) -> None:
    from ortlm.serving.engine import EngineOptions

    with serve(engine=EngineOptions(batch=1, queue=0)) as live:
        body = {"prompt": "import os", "max_tokens": 300, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: call(f"{live.url}/v1/completions", body), range(6)))
        statuses = sorted(status for status, _, _ in found)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        for status, headers, answer in found:
            if status == 429:
                assert int(headers["retry-after"]) >= 1
                assert answer["error"]["code"] == "overloaded"


def test_an_error_in_the_middle_of_a_stream(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from ortlm.serving.batch import Batch

    usual, count = Batch.step, []

    def step(self: Batch, *drafts: Any) -> Any:
        count.append(1)
        if len(count) > 3:
            raise MemoryError("never enough")
        return usual(self, *drafts)

    monkeypatch.setattr(Batch, "step", step)
    body = {"prompt": "import os", "max_tokens": 50, "stream": True, "ignore_eos": True}
    status, _, text = call(f"{live.url}/v1/completions", body)
    events = [line for line in text.split("\n\n") if line]
    assert status == 200
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert call(f"{live.url}/v1/completions", {**body, "stream": False})[0] == 200


def start(trained: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [
        sys.executable,
        "-m",
        "ortlm",
        "serve",
        f"tiny={trained}",
        "--port",
        "0",
        "--threads",
        "1",
        *options,
    ]
    source = str(Path(ortlm.__file__).parents[1])
    paths = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving tiny at (http://\S+)/v1", line):
            return process, found[1]
    raise AssertionError(process.wait())


@pytest.mark.parametrize(("drain", "ended"), [("30", True), ("0", False)])
def test_sigterm_under_load(trained: Path, drain: str, ended: bool) -> None:
    """What runs ends, or is told that it cannot; nothing is cut off."""
    process, url = start(trained, "--drain", drain)
    try:
        body = {
            "prompt": "import os",
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
            "temperature": 0,
        }

        def one(_: int) -> str:
            status, _, text = call(f"{url}/v1/completions", body)
            assert status == 200
            return str(text)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(one, number) for number in range(4)]
            while 'num_requests_running{model_name="tiny"} 4.0' not in call(f"{url}/metrics")[2]:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            texts = [answer.result() for answer in answers]
        assert len(set(texts)) >= 1
        for text in texts:
            if ended:
                assert text.endswith("data: [DONE]\n\n")
            else:
                last = [event for event in text.split("\n\n") if event][-1]
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_many_clients_of_which_some_leave(live: Running, lm: ortlm.LanguageModel) -> None:
    """Every answer that is read to its end is that of the same request alone; nothing stays behind."""
    texts = ["import os", "def read", "class A:\n    def", "for line in file:\n"]
    wanted = [lm.generate(text, max_new_tokens=24, reuse_cache=False).text for text in texts]
    host, port = live.url.removeprefix("http://").split(":")

    def one(number: int) -> None:
        text = number % len(texts)
        body = {"prompt": texts[text], "max_tokens": 24, "temperature": 0, "stream": bool(number % 2)}
        if number % 5:
            status, _, answer = call(f"{live.url}/v1/completions", body)
            if number % 2:
                events = [line for line in answer.split("\n\n") if line.startswith("data: {")]
                made = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in events]
                assert "".join(made) == wanted[text]
            else:
                assert answer["choices"][0]["text"] == wanted[text]
            assert status == 200
            return
        sent = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(sent)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port))) as line:
            # In the middle of the body, or of the answer.
            line.sendall((head + sent)[: len(head) + (5 if number % 3 else len(sent))])
            time.sleep(0.003 * (number % 7))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for _ in pool.map(one, range(100)):
            pass
    live.wait_until_idle()
    assert live.stats.cache_tokens == 0
