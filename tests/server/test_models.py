"""Models that are loaded and unloaded while a server runs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import ortlm
from ortlm.artifact import open_artifact
from ortlm.errors import BadArtifact, BadOption
from ortlm.server.metrics import Metrics
from ortlm.server.models import Models, Source, named
from ortlm.server.run import ServeOptions, load_models
from ortlm.server.served import ServedModel
from ortlm.serving.engine import Engine
from tests.server.conftest import Running, running
from tests.server.test_http import call

PROMPT = "import os"


@contextlib.contextmanager
def serving(folders: dict[str, Path], **options: Any) -> Iterator[Running]:
    """Serve ``folders`` by name, as ``ortlm serve`` does."""
    words = [(name, str(folder)) for name, folder in folders.items()]
    with running(lambda metrics: load_models(words, ServeOptions(**options), metrics, threads=1)) as live:
        yield live


def ask(live: Running, model: str, **more: Any) -> tuple[int, Any, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **more}
    return call(f"{live.url}/v1/completions", body)


def text(live: Running, model: str, **more: Any) -> str:
    status, _, answer = ask(live, model, **more)
    assert status == 200, answer
    found: str = answer["choices"][0]["text"]
    return found


def states(live: Running) -> dict[str, Any]:
    _, _, listed = call(f"{live.url}/v1/models")
    return {model["id"]: model["status"] for model in listed["data"]}


def until(check: Callable[[], bool]) -> None:
    for _ in range(1000):
        if check():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def metric(live: Running, name: str) -> float:
    _, _, page = call(f"{live.url}/metrics")
    (line,) = [line for line in page.splitlines() if line.startswith(name)]
    return float(line.rsplit(" ", 1)[1])


@pytest.fixture(scope="module")
def alone(lm: ortlm.LanguageModel) -> str:
    return lm.generate(PROMPT, max_new_tokens=8, reuse_cache=False).text


def test_an_idle_model_is_unloaded_and_comes_back(trained: Path, alone: str) -> None:
    with serving({"tiny": trained}, idle_seconds=0.2) as live:
        assert states(live) == {"tiny": {"value": "loaded"}}
        assert text(live, "tiny") == alone
        (slot,) = live.models.all
        gone = weakref.ref(slot.served.lm)
        until(lambda: states(live) == {"tiny": {"value": "unloaded"}})
        gc.collect()
        assert gone() is None, "something holds the model that was unloaded"
        assert metric(live, 'ortlm:model_loaded{model_name="tiny"}') == 0
        before = metric(live, 'ortlm:generation_tokens_total{model_name="tiny"}')
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: text(live, "tiny"), range(4))) == [alone] * 4
        assert slot.loads == 2
        # What was counted before counts on.
        assert metric(live, 'ortlm:generation_tokens_total{model_name="tiny"}') > before > 0


def test_what_runs_is_never_cut(trained: Path, lm: ortlm.LanguageModel) -> None:
    wanted = lm.generate(PROMPT, max_new_tokens=200, ignore_eos=True, reuse_cache=False)
    with serving({"tiny": trained}, idle_seconds=0.01) as live:
        for _ in range(3):
            # A stream holds no lease once it is submitted.
            more = {"max_tokens": 200, "ignore_eos": True}
            assert text(live, "tiny", **more) == wanted.text
            status, _, events = ask(live, "tiny", stream=True, **more)
            assert status == 200
            assert events.rstrip().endswith("[DONE]")
            assert '"error"' not in events


def test_loading_and_unloading_by_request(trained: Path, alone: str) -> None:
    with serving({"tiny": trained, "other": trained}) as live:
        url = live.url
        assert call(f"{url}/models/unload", {"model": "tiny"})[::2] == (200, {"success": True})
        assert call(f"{url}/models/unload", {"model": "tiny"})[0] == 200
        assert states(live) == {"tiny": {"value": "unloaded"}, "other": {"value": "loaded"}}
        assert text(live, "other") == alone
        assert states(live)["tiny"] == {"value": "unloaded"}
        assert call(f"{url}/models/load", {"model": "tiny"})[::2] == (200, {"success": True})
        assert states(live)["tiny"] == {"value": "loaded"}
        assert call(f"{url}/models/load", {"model": "tiny"})[0] == 200
        for path in ("load", "unload"):
            status, _, answer = call(f"{url}/models/{path}", {"model": "none"})
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
        status, _, answer = call(f"{url}/models/load", b"{")
        assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_an_unload_waits_for_what_runs(trained: Path, alone: str) -> None:
    with serving({"tiny": trained}) as live, concurrent.futures.ThreadPoolExecutor(3) as pool:
        (slot,) = live.models.all
        engine = slot.served.engine
        held = threading.Event()
        engine.run(held.wait)
        first = pool.submit(text, live, "tiny")
        until(lambda: engine.stats().waiting == 1)
        unload = pool.submit(call, f"{live.url}/models/unload", {"model": "tiny"})
        until(lambda: states(live)["tiny"]["value"] == "unloading")
        late = pool.submit(text, live, "tiny")
        until(lambda: len(slot.waiting) == 1)
        assert not unload.done()
        held.set()
        assert first.result() == alone
        assert unload.result()[0] == 200
        # Whoever came meanwhile is answered by the model that is loaded next.
        assert late.result() == alone
        assert slot.loads == 2


def test_only_so_many_are_loaded(trained: Path, alone: str) -> None:
    folders = dict.fromkeys(("a", "b", "c"), trained)
    with serving(folders, most_loaded=2) as live:
        assert [state["value"] for state in states(live).values()] == ["loaded", "loaded", "unloaded"]
        assert text(live, "a") == alone
        # The one that was used least recently goes.
        assert text(live, "c") == alone
        assert [state["value"] for state in states(live).values()] == ["loaded", "unloaded", "loaded"]
        names = [name for _ in range(5) for name in folders]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda name: text(live, name), names)) == [alone] * len(names)
        assert sum(state["value"] == "loaded" for state in states(live).values()) <= 2


def slow_source(folder: Path, begun: threading.Event, go: threading.Event) -> Source:
    def load() -> ServedModel:
        begun.set()
        assert go.wait(60)
        lm = ortlm.load(folder, threads=1)
        return ServedModel("slow", lm, Engine(lm))

    return Source("slow", load, open_artifact(folder), 64)


def test_others_are_answered_while_a_model_is_loaded(
    trained: Path, lm: ortlm.LanguageModel, alone: str
) -> None:
    begun, go = threading.Event(), threading.Event()

    def models(_: Any) -> Models:
        return Models([ServedModel("tiny", lm, Engine(lm)), slow_source(trained, begun, go)])

    with running(models) as live, concurrent.futures.ThreadPoolExecutor(20) as pool:
        # More than there are threads for work that may block.
        waiting = [pool.submit(text, live, "slow") for _ in range(20)]
        assert begun.wait(60)
        until(lambda: len(live.models.all[1].waiting) == 20)
        assert states(live)["slow"] == {"value": "loading"}
        status, _, answer = call(f"{live.url}/models/unload", {"model": "slow"})
        assert (status, answer["error"]["code"]) == (409, "model_is_loading")
        status, _, answer = call(f"{live.url}/models/unload", {"model": "tiny"})
        assert (status, answer["error"]["param"]) == (400, "model")
        assert text(live, "tiny") == alone
        go.set()
        assert [one.result() for one in waiting] == [alone] * 20


def test_a_shutdown_while_a_model_is_loaded(trained: Path, lm: ortlm.LanguageModel) -> None:
    begun, go = threading.Event(), threading.Event()

    def models(_: Any) -> Models:
        return Models([ServedModel("tiny", lm, Engine(lm)), slow_source(trained, begun, go)])

    with running(models) as live, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, live, "slow")
        assert begun.wait(60)
        closing = threading.Thread(target=live.models.close)
        closing.start()
        status, _, answer = waiting.result()
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        go.set()
        closing.join()
        assert live.models.all[1].served is None


def test_a_load_that_fails_is_an_error_of_those_who_wait(trained: Path, tmp_path: Path, alone: str) -> None:
    shutil.copytree(trained, tmp_path / "tiny")
    with serving({"tiny": tmp_path / "tiny", "other": trained}) as live:
        assert call(f"{live.url}/models/unload", {"model": "tiny"})[0] == 200
        # Gone as a whole, then incomplete.
        (tmp_path / "tiny").rename(tmp_path / "aside")
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for status, _, answer in pool.map(lambda _: ask(live, "tiny"), range(4)):
                assert (status, answer["error"]["code"]) == (503, "model_load_failed")
                assert answer["error"]["message"].startswith("the folder of the model tiny is gone.")
        assert states(live)["tiny"] == {"value": "unloaded", "failed": True}
        (tmp_path / "tiny").mkdir()
        status, _, answer = call(f"{live.url}/models/load", {"model": "tiny"})
        assert (status, answer["error"]["code"]) == (503, "model_load_failed")
        assert answer["error"]["message"] == (
            "the model tiny could not be loaded; the server's log says why."
        )
        assert metric(live, 'ortlm:model_loads_total{model_name="tiny",result="failed"}') >= 2
        assert text(live, "other") == alone
        assert call(f"{live.url}/health")[0] == 200
        (tmp_path / "tiny").rmdir()
        (tmp_path / "aside").rename(tmp_path / "tiny")
        assert text(live, "tiny") == alone
        assert states(live)["tiny"] == {"value": "loaded"}


def test_a_link_is_called_as_it_is(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "current").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    assert named(["current"]) == [("current", "current")]
    assert named([f"{tmp_path}/current/"]) == [("current", f"{tmp_path}/current/")]
    monkeypatch.chdir(trained)
    assert named(["."]) == [(trained.name, ".")]
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert named([".."]) == [(tmp_path.name, "..")]


def test_what_is_no_model_is_told_at_once(trained: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(BadArtifact, match="is not a folder"),
        serving({"tiny": trained, "none": tmp_path / "none"}, most_loaded=1),
    ):
        pass
    with pytest.raises(BadOption, match="two models are called 'tiny'"):
        load_models([("tiny", str(trained))] * 2, ServeOptions(), Metrics())
    for wrong in ({"idle_seconds": 0}, {"idle_seconds": float("nan")}, {"most_loaded": 0}):
        with pytest.raises(BadOption, match=r"--idle|--max-loaded"):
            ServeOptions(**wrong)  # type: ignore[arg-type]
