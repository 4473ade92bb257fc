"""A short soak: make soak runs a longer one."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

import ortlm

pytest.importorskip("fastapi")

from tests.server.soak import questions, soaking, under_load


def test_nothing_is_lost_mixed_or_left(lm: ortlm.LanguageModel, trained: Path, tmp_path: Path) -> None:
    """Clients leave, are slow or wrong; the model's folder is deleted; the server is ended under load."""
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    with soaking(model, questions(lm, 24, random.Random(1))) as soak:
        began = time.perf_counter()
        soak.run(0, 60)
        soak.wait_until_idle()
        before = soak.sample(began)
        shutil.rmtree(model)
        soak.run(60, 100)
        soak.wait_until_idle()
        after = soak.sample(began)
        under_load(soak, 1000, 40)
    assert not soak.wrong, soak.wrong[:3]
    assert {"whole", "stream", "leaves", "bad", "large", "slow reader", "slow writer"} <= soak.ended.keys()
    assert sum(soak.ended.values()) - soak.ended["full"] == 200
    # Threads of a pool come as they are needed; a socket may still be closing.
    assert after.threads <= before.threads + 4
    assert after.files <= before.files + 2
    assert after.rss <= before.rss + 50
