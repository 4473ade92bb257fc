"""The chat page: its files and their headers, and what it asks of the server."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ortlm
from tests.server.conftest import Running
from tests.server.test_http import call

pytest.importorskip("fastapi")
STATIC = Path(ortlm.__file__).parent / "server" / "page" / "static"
NAMES = sorted(path.name for path in STATIC.iterdir())


def port(url: str) -> str:
    return url.rpartition(":")[2]


def test_the_page(live: Running) -> None:
    status, headers, text = call(f"{live.url}/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "<title>ortlm</title>" in text


def test_the_policy_lets_nothing_in(live: Running) -> None:
    policy = call(f"{live.url}/")[1]["content-security-policy"]
    rules = dict(rule.partition(" ")[::2] for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy
    assert "http" not in policy


def test_files_keep_to_the_policy() -> None:
    """No script or style within the page, nothing of other hosts, and HTML made of text in one place only."""
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", page)
    for name in NAMES:
        text = (STATIC / name).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert ("innerHTML" in text) == (name == "render.js"), name
        assert not re.search(r"\beval\(|new Function|document\.write|insertAdjacentHTML|srcdoc", text), name


def test_all_that_the_page_names_is_there(live: Running) -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    named = set(re.findall(r"/page/static/([\w.-]+)", page))
    for name in NAMES:
        if name.endswith(".js"):
            named |= set(re.findall(r"from '\./([\w.]+)'", (STATIC / name).read_text(encoding="utf-8")))
    assert named | {"index.html"} == set(NAMES)
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
    for name in NAMES:
        status, headers, _ = call(f"{live.url}/page/static/{name}")
        assert status == 200
        assert headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
        assert "content-security-policy" in headers


def test_files_are_asked_for_again_and_not_sent_again(live: Running) -> None:
    status, headers, _ = call(f"{live.url}/page/static/main.js")
    assert headers["cache-control"] == "no-cache"
    for known in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
        status, again, text = call(f"{live.url}/page/static/main.js", if_none_match=known)
        assert (status, text, again["etag"]) == (304, "", headers["etag"])
    assert call(f"{live.url}/page/static/main.js", if_none_match='"other"')[0] == 200
    request = urllib.request.Request(f"{live.url}/", method="HEAD")
    with urllib.request.urlopen(request) as found:
        assert (found.status, found.read()) == (200, b"")


@pytest.mark.parametrize(
    "name",
    ["nothing.js", "..", "%2e%2e%2ffiles.py", "../files.py", "..%5cfiles.py", "", "MAIN.JS"],
)
def test_other_files_are_not_there(live: Running, name: str) -> None:
    status, _, answer = call(f"{live.url}/page/static/{name}")
    assert status in (404, 405), answer
    assert "error" in answer


def test_without_a_page(serve: Callable[..., Any]) -> None:
    from ortlm.server.app import ServerOptions

    with serve(options=ServerOptions(page=False)) as running:
        for path in ("/", "/page/static/main.js", "/page/models", "/page/quality?model=tiny"):
            assert call(running.url + path)[0] == 404
        assert call(f"{running.url}/page/render", {"text": "x"})[0] == 404


def test_the_key_is_asked_for_what_is_no_file(serve: Callable[..., Any]) -> None:
    from ortlm.server.app import ServerOptions

    with serve(options=ServerOptions(keys=["secret"])) as running:
        for path in ("/", "/page/static/main.js"):
            assert call(running.url + path)[0] == 200
        for path in ("/page/models", "/page/quality?model=tiny", "/page/static/../models", "/page/staticx/y"):
            assert call(running.url + path)[0] == 401
            assert call(running.url + path, authorization="Bearer secret")[0] in (200, 404)
        assert call(f"{running.url}/page/render", {"text": "x"})[0] == 401


def test_the_page_may_ask_its_own_server(serve: Callable[..., Any]) -> None:
    """Pages of others may not: neither by their origin, nor under a name that they let lead here."""
    from ortlm.server.app import ServerOptions

    own = {"text": "x"}
    with serve(options=ServerOptions(origins=["https://chat.example:8443"])) as running:
        url, at = f"{running.url}/page/render", port(running.url)

        def status(origin: str, host: str) -> int:
            return int(call(url, own, origin=origin, host=host)[0])

        for name in ("127.0.0.1", "localhost", "[::1]", "192.168.1.5"):
            assert status(f"http://{name}:{at}", f"{name}:{at}") == 200
        # Behind a proxy.
        assert status("https://127.0.0.1", "127.0.0.1") == 200
        assert status("https://chat.example:8443", "chat.example:8443") == 200
        for origin, host in (
            ("http://evil.example", f"127.0.0.1:{at}"),
            (f"http://localhost:{at}", f"127.0.0.1:{at}"),
            ("http://localhost:1", f"localhost:{at}"),
            (f"http://evil.example:{at}", f"evil.example:{at}"),
            (f"http://127.0.0.1.evil.example:{at}", f"127.0.0.1.evil.example:{at}"),
            (f"http://localhost.evil.example:{at}", f"localhost.evil.example:{at}"),
            (f"http://localhost@evil.example:{at}", f"localhost@evil.example:{at}"),
            ("null", f"127.0.0.1:{at}"),
            ("file://", f"127.0.0.1:{at}"),
        ):
            assert status(origin, host) == 403, (origin, host)


def test_the_page_is_shown_at_known_hosts(serve: Callable[..., Any]) -> None:
    """GET requests of a page have no Origin."""
    with serve() as running:
        for path in ("/", "/page/models", "/page/static/main.js"):
            status, _, answer = call(running.url + path, host=f"evil.example:{port(running.url)}")
            assert (status, answer["error"]["code"]) == (403, "host_not_allowed")
            assert "--cors-origin" in answer["error"]["message"]
        # Clients of the API have no page that somebody could read through.
        assert call(f"{running.url}/v1/models", host="a-container:8000")[0] == 200


def test_rendering(live: Running) -> None:
    status, _, answer = call(f"{live.url}/page/render", {"text": "**x** <script>"})
    assert status == 200
    assert answer == {"html": "<p><strong>x</strong> &lt;script&gt;</p>\n"}
    for body in (b"", b"{", {}, {"text": 1}, {"text": "x", "html": True}, b'{"text": "\\ud800"}'):
        status, _, answer = call(f"{live.url}/page/render", body)
        assert status == 400, body
        assert answer["error"]["type"] == "invalid_request_error"
    status, _, answer = call(f"{live.url}/page/render", {"text": "x" * 100_001})
    assert (status, answer["error"]["param"]) == (400, "text")


def test_the_log_is_not_filled_by_the_page(
    live: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_log = logging.getLogger("ortlm.server.requests")
    monkeypatch.setattr(request_log, "handlers", [])
    monkeypatch.setattr(request_log, "propagate", True)
    with caplog.at_level("INFO", logger=request_log.name):
        call(f"{live.url}/page/render", {"text": "x"}, x_request_id="good")
        call(f"{live.url}/page/render", {"text": 1}, x_request_id="bad")
        for _ in range(500):
            # The line is written after the answer.
            if "bad" in caplog.text:
                break
            time.sleep(0.01)
    assert [json.loads(record.message)["request_id"] for record in caplog.records] == ["bad"]


def test_what_is_told_of_models(live: Running, lm: ortlm.LanguageModel) -> None:
    status, _, answer = call(f"{live.url}/page/models")
    assert status == 200
    (model,) = answer["models"]
    assert (model["name"], model["chat"], model["images"]) == ("tiny", lm.chat_template is not None, False)
    assert model["vocabulary"] == lm.tokenizer.fingerprint
    assert model["about"]["precision"] == lm.manifest.info["precision"]
    assert "files" not in model["about"]
    assert call(f"{live.url}/v1/models")[2]["data"][0]["input_modalities"] == ["text"]


@pytest.fixture
def report(lm: ortlm.LanguageModel) -> Iterator[Path]:
    """Where the model's report is."""
    path = lm.artifact.path / "report.json"
    assert not path.exists()
    yield path
    path.unlink(missing_ok=True)


def test_quality(live: Running, report: Path, lm: ortlm.LanguageModel) -> None:
    url = f"{live.url}/page/quality?model=tiny"
    status, _, answer = call(url)
    assert status == 200
    assert answer["report"] is None
    assert answer["check"] == lm.manifest.info.get("check")
    figures = {"kld": {"value": 0.5}}
    report.write_text(
        json.dumps({"statistics": figures, "text": {"name": "x", "how": "long"}, "worst": ["y"]})
    )
    found = call(url)[2]["report"]
    assert found["statistics"] == figures
    assert found["text"] == {"name": "x"}
    assert "worst" not in found
    for broken in ("", "[]", "{}", '{"statistics": ', "[" * 100_000):
        report.write_text(broken)
        status, _, answer = call(url)
        assert (status, answer["report"]) == (200, None)


def test_quality_of_unknown_models(live: Running) -> None:
    assert call(f"{live.url}/page/quality?model=none")[0] == 404
    assert call(f"{live.url}/page/quality")[0] == 200


def test_fingerprints(lm: ortlm.LanguageModel) -> None:
    """They say what ``same_as`` says."""
    from ortlm.runtime.text.tokenizer import Tokenizer

    again = Tokenizer.open(lm.artifact.tokenizer_path)
    assert again.same_as(lm.tokenizer)
    assert again.fingerprint == lm.tokenizer.fingerprint
    again._inner.add_tokens(["another one"])
    other = Tokenizer.open(lm.artifact.tokenizer_path)
    other._inner.add_tokens(["another one"])
    assert other.fingerprint != lm.tokenizer.fingerprint
    assert not other.same_as(lm.tokenizer)


def test_ids_of_tokens(live: Running, lm: ortlm.LanguageModel) -> None:
    """return_token_ids gives what was computed, whole and streamed, and completions take it as a prompt."""
    body = {
        "messages": [{"role": "user", "content": "What does os.path.join do?"}],
        "max_tokens": 12,
        "temperature": 0,
        "return_token_ids": True,
    }
    url = f"{live.url}/v1/chat/completions"
    whole = call(url, body)[2]
    wanted = lm.generate(body["messages"], max_new_tokens=12, temperature=0)  # type: ignore[arg-type]
    prompt, ids = whole["prompt_token_ids"], whole["choices"][0]["token_ids"]
    assert prompt == lm.encode(body["messages"])  # type: ignore[arg-type]
    assert tuple(ids) == wanted.token_ids
    lines = call(url, {**body, "stream": True})[2].splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event] == [prompt]
    assert [id_ for event in events for id_ in event["choices"][0]["token_ids"]] == ids
    echoed = call(
        f"{live.url}/v1/completions",
        {"prompt": prompt + ids, "max_tokens": 0, "echo": True, "logprobs": 1},
    )[2]
    tokens = echoed["choices"][0]["logprobs"]
    assert len(tokens["tokens"]) == len(prompt) + len(ids)
    # Greedy: each token of the answer is the most likely one.
    for text, tops in list(zip(tokens["tokens"], tokens["top_logprobs"], strict=True))[len(prompt) :]:
        assert max(tops, key=tops.__getitem__) == text
    plain = call(url, {**body, "return_token_ids": None})[2]
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]
