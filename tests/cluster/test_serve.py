"""The server on Ray Serve: streams, clients that go away, sessions, and another model in place of one."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import ortlm
from ortlm.errors import Error

PORT = 18_765


def asked(body: dict[str, Any], **headers: str) -> tuple[int, bytes]:
    """Return status and body of the answer to a completion."""
    body = {"max_tokens": 8, "temperature": 0, **body}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)) as line:
        line.request(
            "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", **headers}
        )
        answer = line.getresponse()
        return answer.status, answer.read()


def text(answer: bytes) -> str:
    return str(json.loads(answer)["choices"][0]["text"])


def cancelled() -> int:
    """Return how many requests were cancelled on whichever replica answers."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)) as line:
        line.request("GET", "/metrics")
        said = line.getresponse().read().decode()
    found = re.findall(r"^ortlm:\S*\{\S*cancelled\S*\} (\S+)", said, re.MULTILINE)
    return round(sum(map(float, found)))


@pytest.fixture(scope="module")
def deployed(cluster: Any, trained: Path) -> Iterator[Any]:
    """Return a function that deploys the small model under a name, with two replicas that know sessions."""
    from ortlm.server.on_ray import Replicas, deploy, undeploy
    from ortlm.server.run import ServeOptions

    def put(name: str) -> str:
        options = ServeOptions(port=PORT, drain_seconds=20.0)
        return deploy(
            cluster.address, [f"{name}={trained}"], options, Replicas(2, 2, sessions=True), threads=1
        )

    put("tiny")
    yield put
    undeploy(cluster.address)


def test_answers_streams_and_errors(deployed: Any, lm: ortlm.LanguageModel) -> None:
    alone = lm.generate("import os", max_new_tokens=8, temperature=0, reuse_cache=False).text
    for _ in range(4):
        status, answer = asked({"prompt": "import os"})
        assert (status, text(answer)) == (200, alone)
    status, answer = asked({"prompt": "import os", "stream": True})
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == alone
    assert answer.endswith(b"data: [DONE]\n\n")
    status, answer = asked({"prompt": "import os", "model": "other"})
    assert status == 404
    assert json.loads(answer)["error"]["code"] == "model_not_found"


def test_a_session_stays_with_its_replica(deployed: Any) -> None:
    prompt = "from pathlib import Path\n\ndef read_lines(path: Path) -> list[str]:\n    "
    for number in range(6):
        cached = []
        for _ in range(2):
            body = {"prompt": f"# {number * 1_111}\n{prompt}"}
            _, answer = asked(body, **{"x-session-id": f"session-{number}"})
            cached.append(json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0
        assert cached[1] > 16


def test_a_client_that_goes_away_ends_its_request(deployed: Any) -> None:
    body = {"prompt": "import", "max_tokens": 480, "ignore_eos": True, "stream": True, "temperature": 0}
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", PORT), timeout=60) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(content), content)
        )
        assert b"200" in line.recv(100)
    until = time.monotonic() + 20
    while not cancelled():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_another_model_takes_its_place_without_an_error(deployed: Any) -> None:
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            status, answer = asked({"prompt": "import os"})
            seen.append((status, json.loads(answer).get("model", "")))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        deployed("newer")
        # Who routes requests hears of it a little later.
        until = time.monotonic() + 60
        while {model for _, model in seen[-12:]} != {"newer"} and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in seen} == {200}
    assert seen[0][1] == "tiny"
    assert seen[-1][1] == "newer"


def test_replicas_are_added_under_load(deployed: Any, cluster: Any, trained: Path) -> None:
    from ortlm.cluster.connection import connected
    from ortlm.server.on_ray import APPLICATION, Replicas, deploy, undeploy
    from ortlm.server.run import ServeOptions

    # So that there is one at first, not what an earlier deployment had.
    undeploy(cluster.address)
    deploy(cluster.address, [f"tiny={trained}"], ServeOptions(port=PORT), Replicas(1, 2, busy=1.0), threads=1)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert asked({"prompt": "import os", "max_tokens": 200, "ignore_eos": True})[0] == 200

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        with connected(cluster.address):
            from ray import serve

            until = time.monotonic() + 120
            while True:
                found = serve.status().applications[APPLICATION].deployments[APPLICATION].replica_states
                if found.get("RUNNING") == 2:
                    break
                assert time.monotonic() < until, found
                time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_model_that_nodes_lack(deployed: Any, cluster: Any, tmp_path: Path) -> None:
    from ortlm.server.on_ray import Replicas, deploy
    from ortlm.server.run import ServeOptions

    with pytest.raises(Error, match="is not a folder"):
        deploy(cluster.address, [str(tmp_path / "nowhere")], ServeOptions(port=PORT), Replicas())
