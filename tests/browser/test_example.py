"""The page of examples/browser runs a model, streams, stops, and says what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.builder.transformers_js import LAYOUT
from tests.browser.environment import JAVASCRIPT, chromium, copy_programs
from tests.browser.test_browser import WANTED
from tests.runtimes.environments import ROOT, Unavailable, prepare

pytestmark = pytest.mark.skipif(
    WANTED not in ("all", "chromium"), reason="browsers have tests of their own: make test-browser"
)
QUESTION = "What does os.path.join do?"


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("example") / "model"
    options = BuildOptions(recipe="fast", accuracy_level=1)
    ortlm.build(tiny, out, layout=LAYOUT, precision="q4,q8", options=options)
    return out


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, with its libraries."""
    try:
        chromium()
        prepare(JAVASCRIPT)
    except Unavailable as error:
        pytest.skip(str(error))
    copy_programs()
    place = tmp_path_factory.mktemp("page") / "browser"
    shutil.copytree(ROOT / "examples" / "browser", place, ignore=shutil.ignore_patterns("node_modules"))
    (place / "node_modules").symlink_to(JAVASCRIPT.folder / "node_modules")
    return place


@pytest.fixture
def ask(example: Path, model: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Return a function that uses the page, which is served for ``model``."""
    command = [sys.executable, str(example / "serve.py"), str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()

        def use(**asked: Any) -> dict[str, Any]:
            given, answers = tmp_path / "given.json", tmp_path / "answers.json"
            given.write_text(json.dumps({"url": url, "chromium": chromium(), "prompt": QUESTION, **asked}))
            run = ["node", str(JAVASCRIPT.folder / "example.mjs"), str(given), str(answers)]
            subprocess.run(run, check=True, timeout=1500)
            found: dict[str, Any] = json.loads(answers.read_text())
            return found

        try:
            yield use
        finally:
            server.terminate()


def test_versions_are_the_tested_ones() -> None:
    needs = json.loads((ROOT / "examples" / "browser" / "package.json").read_text())["dependencies"]
    assert [f"{name}@{version}" for name, version in needs.items()] == [JAVASCRIPT.packages[-1]]


@pytest.mark.parametrize("device", ["wasm", "webgpu"])
def test_answer(device: str, ask: Callable[..., dict[str, Any]], model: Path) -> None:
    """The page shows what ortlm answers, and logs nothing."""
    found = ask(device=device, tokens=12)
    chat = [{"role": "user", "content": QUESTION}]
    wanted = ortlm.load(model).generate(chat, max_new_tokens=12, temperature=0).text
    assert found["logged"] == []
    assert found["answer"].strip() == wanted.strip()
    assert found["status"].startswith("12 tokens; the first after")


def test_long_prompts_are_refused_where_attention_is_wrong(ask: Callable[..., dict[str, Any]]) -> None:
    """Chromium's software adapter is used through Vulkan: see Device.most_tokens."""
    found = ask(device="webgpu", tokens=4, prompt=" ".join([QUESTION] * 4))
    assert found["answer"] == ""
    assert "WebGPU in this browser is right for 31 at once" in found["status"]
    # The page goes on.
    assert ask(device="wasm", tokens=4, prompt=" ".join([QUESTION] * 4))["answer"] != ""


def test_stop(ask: Callable[..., dict[str, Any]]) -> None:
    found = ask(device="wasm", tokens=400, stopped=True)
    assert found["logged"] == []
    assert 1 <= int(found["status"].split()[0]) < 100


def test_missing_weights_are_explained(ask: Callable[..., dict[str, Any]], model: Path) -> None:
    weights = model / "onnx" / "model_q4.onnx_data"
    aside = weights.rename(weights.with_name("aside"))
    try:
        found = ask(device="wasm", tokens=4)
    finally:
        aside.rename(weights)
    assert "A file of the model is missing" in found["status"]
    assert found["answer"] == ""


def test_other_folders_are_refused(example: Path, tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example / "serve.py"), str(tiny)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "was not built for browsers" in done.stderr
