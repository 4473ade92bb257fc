"""The prefill of one request."""

from __future__ import annotations

import pytest

from ortlm.serving.prefill import Prefill
from ortlm.serving.prefixes import Prefix
from tests.architectures import oracle


@pytest.mark.parametrize("name", ["llama3", "lfm2", "qwen3.5", "granite4-h"])
def test_a_prefix_may_be_shorter_than_states_of_one_size_are_wide(build, name):
    lm = build(name)
    ids = oracle.random_tokens(20)
    loop = lm.loop()
    loop.start()
    loop.append([ids[:8]])
    prefill = Prefill(lm.loop(), ids)
    prefill.resume_from(Prefix("", long=False, tokens=ids[:8], states=loop.row(0), exact=8), 8)
    logits = prefill.step(256)
    assert logits is not None
    assert oracle.relative_error(logits, lm.logits(ids)[-1]) < 1e-4
