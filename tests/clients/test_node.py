"""OpenAI's client for JavaScript, in node.

Takes packages from npm, so it is left out unless asked for: make test-clients CLIENTS=node
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from tests.clients import wanted
from tests.runtimes.environments import HOME
from tests.server.conftest import Running, lm, running, trained
from tests.server.scripted import with_template
from tests.server.test_tools import CHATML

pytestmark = [wanted("node")]
pytest.importorskip("fastapi")

__all__ = ["lm", "trained"]
NODE = Path(__file__).parent / "node"
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture(scope="module")
def packages() -> Path:
    """Return the folder with the client and its packages, in the versions of the lock."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"OpenAI's client for JavaScript needs {tool}, which is not installed")
    folder = HOME / "openai-node"
    folder.mkdir(parents=True, exist_ok=True)
    lock = (NODE / "package-lock.json").read_text()
    if not (folder / ".complete").is_file() or (folder / ".complete").read_text() != lock:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NODE / name, folder)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install OpenAI's client: {done.stderr.strip()[-300:]}")
        (folder / ".complete").write_text(lock)
    shutil.copy(NODE / "client.mjs", folder)
    return folder


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("node") / "tiny"
    with_template(trained, folder, CHATML, ("<tool_call>", "</tool_call>"), special=False)
    with running(ortlm.load(folder, threads=1)) as found:
        yield found


@pytest.fixture(scope="module")
def found(served: Running, packages: Path) -> dict[str, Any]:
    around = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    command = ["node", str(packages / "client.mjs"), served.url]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, Any] = json.loads(done.stdout)
    assert not [answer for answer in answers.values() if isinstance(answer, dict) and "failed" in answer]
    return answers


def test_chat_and_streams(found: dict[str, Any], served: Running) -> None:
    model = served.models.all[0].served.lm
    wanted = model.generate(HELLO, max_new_tokens=12, reuse_cache=False).text
    assert found["models"] == ["tiny"]
    assert (found["chat"]["text"], found["chat"]["reason"]) == (wanted, "length")
    assert found["stream"]["text"] == wanted
    assert found["stream"]["usage"]["completion_tokens"] == 12
    assert found["responses"] == {"text": wanted, "streamed": wanted}
    text = "import os" + model.generate("import os", max_new_tokens=4, reuse_cache=False).text
    assert found["completions"] == {"text": text, "tokens": len(model.encode("import os")) + 4}


def test_calls_and_structured_output(found: dict[str, Any]) -> None:
    call = found["call"]
    arguments = json.loads(call["arguments"])
    assert (call["name"], arguments["city"] in ("Paris", "Rome")) == ("weather", True)
    assert [json.loads(text) for text in call["streamed"]] == [arguments]
    assert call["after"] in ("length", "stop")
    assert found["structured"]["name"] in ("pen", "cup")
    assert len(found["structured"]["sizes"]) <= 2


def test_embeddings(found: dict[str, Any], served: Running) -> None:
    np.testing.assert_allclose(
        found["embeddings"], served.models.all[0].served.lm.embed(["import os", "def"]), atol=1e-5
    )


def test_errors_and_ends(found: dict[str, Any], served: Running) -> None:
    errors = found["errors"]
    assert (errors["missing"]["kind"], errors["missing"]["status"]) == ("NotFoundError", 404)
    assert (errors["wrong"]["kind"], errors["wrong"]["param"]) == ("BadRequestError", "temperature")
    assert errors["late"]["kind"] == "APIConnectionTimeoutError"
    assert found["abort"] == {"kind": "APIUserAbortError", "chunks": 3}
    # What the client no longer waits for is not computed to its end.
    served.wait_until_idle()
