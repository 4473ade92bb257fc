import math

import numpy as np
import pytest

from ortlm.errors import BadOption, Error
from ortlm.runtime.sampling.logprobs import TokenLogprob, prompt_logprobs, token_logprob

LOGITS = (np.random.default_rng(0).normal(size=(5, 40_000)) * 5).astype(np.float32)


def reference(row):
    """Return the log-softmax in float64, the sum without rounding errors."""
    wide = row.astype(np.float64) - float(row.max())
    return wide - math.log(math.fsum(np.exp(wide)))


@pytest.mark.parametrize("top", [0, 1, 20, 2000])
@pytest.mark.parametrize("row", LOGITS[:2])
def test_equals_the_softmax(row, top):
    want, order = reference(row), np.argsort(-row, kind="stable")
    found = token_logprob(row, 123, top)
    assert (found.token_id, len(found.top)) == (123, top)
    assert found.logprob == pytest.approx(want[123], rel=1e-12)
    assert [token for token, _ in found.top] == order[:top].tolist()
    assert np.allclose([logprob for _, logprob in found.top], want[order[:top]], rtol=1e-12, atol=0)


def test_equals_come_by_id():
    found = token_logprob(np.array([1, 3, 1, 3, -np.inf], np.float32), 4, 3)
    assert [token for token, _ in found.top] == [1, 3, 0]
    assert found.logprob == -math.inf


def test_top_above_the_vocabulary():
    assert [token for token, _ in token_logprob(np.arange(3, dtype=np.float32), 0, 9).top] == [2, 1, 0]


def test_near_certainty_keeps_its_digits():
    found = token_logprob(np.array([0, 40], np.float32), 1)
    assert found.logprob == pytest.approx(-math.exp(-40), rel=1e-12)


def test_prompts():
    ids = [3, 9, 2, 7, 5]
    found = prompt_logprobs(LOGITS, ids, 2)
    assert found == [None, *(token_logprob(LOGITS[at], ids[at + 1], 2) for at in range(4))]
    assert isinstance(found[1], TokenLogprob)
    assert prompt_logprobs(LOGITS[:4], ids, 2) == found
    assert prompt_logprobs(LOGITS[:1], [3]) == [None]
    with pytest.raises(BadOption, match="3 tokens need as many rows"):
        prompt_logprobs(LOGITS, ids[:3])


def test_errors():
    with pytest.raises(BadOption, match="token id 40000 is outside the vocabulary 0 … 39999"):
        token_logprob(LOGITS[0], 40_000)
    for row in ([np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]):
        with pytest.raises(Error, match="hold NaN or infinity"):
            token_logprob(np.array(row, np.float32), 0)
