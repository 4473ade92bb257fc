"""The chat page of ``ortlm serve``, used in Chromium as people do; axe looks for what keeps some of them out.

The checks are in ``programs/chat_page.mjs``. SHOTS=FOLDER keeps images of what they see.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.evaluation.evaluate import evaluate
from tests.browser.environment import PROGRAMS, chromium
from tests.browser.test_browser import WANTED
from tests.runtimes.environments import Runtime, Unavailable, prepare
from tests.server.test_markdown import ATTACKS

pytest.importorskip("fastapi")
pytestmark = pytest.mark.skipif(
    WANTED not in ("all", "quick", "chromium", "page"),
    reason="browsers have tests of their own: make test-browser",
)
PLAYWRIGHT = Runtime("playwright", ("axe-core@4.14.1", "playwright-core@1.65.1"), "chat_page.mjs")
PROGRAM = (PROGRAMS / PLAYWRIGHT.program).read_text(encoding="utf-8")
CHECKS = re.findall(r"^  (?:async )?(\w+)(?:\(page(?:, logged)?\) \{|: \(page\))", PROGRAM, re.MULTILINE)
# Marks that what an answer holds has been run.
ATTACK = "\n\n".join(ATTACKS).replace("alert(1)", "window.attacked=true")


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in int4 with a report, the same in fp32, and one that takes images."""
    from PIL import Image

    from tests.vision import checkpoint

    place = tmp_path_factory.mktemp("models")
    found = {name: place / name for name in ("int4", "fp32", "vision")}
    fast = BuildOptions(recipe="fast")
    ortlm.build(tiny, found["int4"], precision="int4", options=fast)
    ortlm.build(tiny, found["fp32"], precision="fp32")
    checkpoint.save(place / "checkpoint")
    Image.new("RGB", (48, 32), "orange").save(place / "image.png")
    ortlm.build(place / "checkpoint", found["vision"], precision="int4", options=fast)
    evaluate(found["int4"], reference=found["fp32"], layers=True, speed=False, tokens=512, chunk=128).write()
    return found


@contextlib.contextmanager
def served(folders: list[Path], *options: str) -> Iterator[str]:
    """Serve ``folders``; yield the page's address."""
    command = [sys.executable, "-m", "ortlm", "serve", *map(str, folders), "--port", "0", "--threads", "1"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"page to chat with at (http://\S+/)", line):
                    break
            else:
                raise AssertionError("the server ended")
            # So that it never waits for somebody to read its log.
            reader = threading.Thread(target=process.stderr.read)
            reader.start()
            yield found[1]
            process.terminate()
            reader.join()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def results(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each check."""
    try:
        browser = chromium()
        prepare(PLAYWRIGHT)
    except Unavailable as error:
        pytest.skip(str(error))
    program = PLAYWRIGHT.folder / PLAYWRIGHT.program
    shutil.copy(PROGRAMS / PLAYWRIGHT.program, program)
    place = tmp_path_factory.mktemp("page")
    with (
        served(list(models.values())) as url,
        served([models["int4"]], "--api-key", "secret") as closed,
    ):
        given, answers = place / "given.json", place / "answers.json"
        given.write_text(
            json.dumps(
                {
                    "url": url,
                    "closed": closed,
                    "browserPath": browser,
                    "image": str(models["vision"].parent / "image.png"),
                    "attack": ATTACK,
                    "shots": os.environ.get("SHOTS"),
                    "only": os.environ.get("ONLY"),
                }
            )
        )
        done = subprocess.run(
            ["node", str(program), str(given), str(answers)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert answers.is_file(), done.stderr[-3000:]
        found: dict[str, Any] = json.loads(answers.read_text())
        return found


def test_all_checks_are_run(results: dict[str, Any]) -> None:
    assert sorted(results) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_page(name: str, results: dict[str, Any]) -> None:
    assert results[name]["error"] is None, results[name]["error"]
    assert results[name]["logged"] == []
