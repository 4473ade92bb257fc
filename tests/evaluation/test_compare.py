"""What two models say of each token, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ortlm.errors import BadArtifact, BadCheckpoint, BadOption
from ortlm.evaluation.compare import compare, most_likely, score
from tests.evaluation.fakes import VOCAB, FakeSource, random_chunks


def test_scores_are_those_of_torch() -> None:
    random = np.random.default_rng(0)
    q, p = (3 * random.normal(size=(40, 1000)).astype(np.float32) for _ in range(2))
    targets = random.integers(0, 1000, 40)
    found = score(q, p, targets)
    ln_q, ln_p = (torch.log_softmax(torch.from_numpy(x).double(), dim=1) for x in (q, p))
    kld = torch.nn.functional.kl_div(ln_q, ln_p, reduction="none", log_target=True).sum(1)
    np.testing.assert_allclose(found.kld, kld, rtol=1e-12)
    np.testing.assert_allclose(found.nll, -ln_q[torch.arange(40), torch.from_numpy(targets)], rtol=1e-12)
    np.testing.assert_array_equal(found.same_top, q.argmax(1) == p.argmax(1))


def test_second_half_of_each_chunk_is_scored_in_lockstep() -> None:
    chunks = random_chunks(count=3, size=64)
    model, base = FakeSource(noise=0.1), FakeSource()
    for source in (model, base):
        source.open(chunks.tokens)
    heard: list[int] = []
    found = compare(model, base, chunks, heard.append)
    assert len(found.scores.nll) == chunks.scored == 3 * (64 - 1 - 32)
    assert model.asked == base.asked == [0, 1, 2]
    assert heard == [1, 1, 1]
    # The first scored token is the one after position 32.
    first = chunks.tokens[0]
    logits = base.table[first[32]].astype(np.float64)
    assert found.scores.base_nll[0] == pytest.approx(np.log(np.exp(logits).sum()) - logits[first[33]])


def test_worst_places_come_first() -> None:
    chunks = random_chunks(count=4, size=64)
    model, base = FakeSource(noise=0.5), FakeSource()
    for source in (model, base):
        source.open(chunks.tokens)
    found = compare(model, base, chunks)
    klds = [place.kld for place in found.worst]
    np.testing.assert_array_equal(klds, np.sort(found.scores.kld)[::-1][: len(klds)])
    place = found.worst[0]
    assert place.base_top == most_likely(base.table[chunks.tokens[place.chunk][place.at]])
    assert place.top == most_likely(model.table[chunks.tokens[place.chunk][place.at]])


def test_equal_logits_rank_by_token() -> None:
    assert [token for token, _ in most_likely(np.zeros(9, np.float32))] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("broken", "error"), [("model", BadArtifact), ("base", BadCheckpoint)])
def test_logits_that_are_no_numbers(broken: str, error: type[Exception]) -> None:
    chunks = random_chunks()
    sources = {"model": FakeSource(noise=0.1), "base": FakeSource()}
    sources[broken].table[:, 3] = np.nan
    for source in sources.values():
        source.open(chunks.tokens)
    with pytest.raises(error, match="no finite numbers in chunk 0"):
        compare(sources["model"], sources["base"], chunks)


def test_another_vocabulary() -> None:
    chunks = random_chunks()
    model, base = FakeSource(vocab=VOCAB + 1), FakeSource()
    for source in (model, base):
        source.open(chunks.tokens)
    with pytest.raises(BadOption, match=f"{VOCAB + 1} tokens and the reference one of {VOCAB}"):
        compare(model, base, chunks)
