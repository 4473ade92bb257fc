"""Several models in one server."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("fastapi")

import ortlm
from ortlm.errors import ShutDown
from ortlm.server.served import Models, ServedModel
from ortlm.serving.engine import Engine


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
