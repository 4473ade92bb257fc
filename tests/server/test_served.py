"""Several models in one server."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import ortlm
from ortlm.errors import ShutDown
from ortlm.server.models import Models
from ortlm.server.served import ServedModel
from ortlm.serving.engine import Engine
from tests.server.conftest import running
from tests.server.test_http import call


def test_all_models_share_the_time_to_drain(lm: ortlm.LanguageModel, trained: object) -> None:
    engines = [Engine(lm), Engine(ortlm.load(str(trained), threads=1))]
    models = Models([ServedModel(f"m{at}", engine.lm, engine) for at, engine in enumerate(engines)])

    def slow(_: object, logits: object) -> object:
        time.sleep(0.05)
        return logits

    requests = [
        engine.submit([5, 6, 7], max_new_tokens=400, ignore_eos=True, processors=slow)  # type: ignore[arg-type]
        for engine in engines
    ]
    began = time.perf_counter()
    models.close(1.0)
    assert time.perf_counter() - began < 1.9
    for request in requests:
        with pytest.raises(ShutDown):
            request.result()


def test_a_folder_that_is_deleted_while_it_is_served(
    lm: ortlm.LanguageModel, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "tiny")
    messages = [{"role": "user", "content": "What does os.path.join do?"}]
    texts = ["import os", "def read", "class A:", "for line in file:"]
    wanted = [lm.generate(text, max_new_tokens=9, reuse_cache=False).text for text in texts]
    with running(ortlm.load(tmp_path / "tiny", threads=1)) as live:
        shutil.rmtree(tmp_path / "tiny")
        asked: dict[str, Any] = {"max_tokens": 9, "temperature": 0}
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(lambda text: call(f"{live.url}/v1/completions", {"prompt": text, **asked}), texts)
            )
        assert [answer["choices"][0]["text"] for _, _, answer in answers] == wanted
        _, _, answer = call(f"{live.url}/v1/chat/completions", {"messages": messages, **asked})
        said = lm.generate(messages, max_new_tokens=9, reuse_cache=False).text
        assert answer["choices"][0]["message"]["content"] == said
        form = {"type": "json_object"}
        asked = {"messages": messages, "response_format": form, "max_tokens": 30}
        assert call(f"{live.url}/v1/chat/completions", asked)[0] == 200
        assert call(f"{live.url}/tokenize", {"prompt": "import os"})[2]["count"] == 2
