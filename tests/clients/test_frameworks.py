"""LangChain and LlamaIndex, in an environment of their own: what users of theirs get from a server.

make test-clients CLIENTS=langchain
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from tests.clients import wanted
from tests.clients.environment import python
from tests.server.conftest import Running, lm, running, trained
from tests.server.scripted import with_template
from tests.server.test_tools import CHATML

pytest.importorskip("fastapi")

__all__ = ["lm", "trained"]
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("frameworks") / "tiny"
    with_template(trained, folder, CHATML, ("<tool_call>", "</tool_call>"), special=False)
    with running(ortlm.load(folder, threads=1)) as found:
        yield found


def ask(program: str, url: str) -> dict[str, Any]:
    """Return what ``program`` prints."""
    around = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OPENAI_", "LANG"))}
    command = [str(python()), str(Path(__file__).parent / "programs" / program), url]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_call(found: dict[str, Any]) -> None:
    call = found["call"]
    city, days = call["arguments"]["city"], call["arguments"]["days"]
    assert (call["name"], type(city), type(days)) == ("weather", str, int)
    assert call["result"] == f"Sun in {city} for {days} days."
    assert found["after"] in ("stop", "length")


@wanted("langchain")
def test_langchain(served: Running) -> None:
    model = served.models.all[0].served.lm
    said = model.generate(HELLO, max_new_tokens=12, reuse_cache=False).text
    found = ask("langchain_chat.py", served.url)
    assert [found["chat"], found["stream"], found["await"]] == [said] * 3
    assert found["usage"] == {"input": len(model.encode(HELLO)), "output": 12}
    check_call(found)
    assert 0 <= found["structured"]["count"] <= 99
    np.testing.assert_allclose(found["embeddings"], model.embed(["import os", "def"]), atol=1e-5)


@wanted("llamaindex")
def test_llamaindex(served: Running) -> None:
    model = served.models.all[0].served.lm
    said = model.generate(HELLO, max_new_tokens=12, reuse_cache=False).text
    found = ask("llamaindex_chat.py", served.url)
    assert [found["chat"], found["stream"], found["await"]] == [said] * 3
    assert found["complete"] == model.generate("import os", max_new_tokens=4, reuse_cache=False).text
    check_call(found)
