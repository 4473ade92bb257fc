"""What is drawn follows the probabilities: chi-square tests at the level 0.001, with fixed seeds."""

import dataclasses

import numpy as np
import pytest

from ortlm.errors import BadOption, Error
from ortlm.runtime.sampling.logits_processors import from_settings, warpers
from ortlm.runtime.sampling.sampler import accept, draw_among, greedy, multinomial, probabilities
from ortlm.runtime.sampling.settings import Settings

DRAWS = 20_000
LOGITS = (np.random.default_rng(3).normal(size=40) * 1.5).astype(np.float32)


def check(drawn, expected):
    """Compare drawn tokens with probabilities; tokens that are expected less than 10 times are one cell."""
    counts, expected = np.bincount(drawn, minlength=len(expected)), expected * len(drawn)
    assert not counts[expected == 0].any()
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    # The value that chi-square exceeds with probability 0.001, after Wilson and Hilferty (1931).
    free = len(counts) - 1
    limit = free * (1 - 2 / (9 * free) + 3.0902 * (2 / (9 * free)) ** 0.5) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < limit


def reference(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """Return the probabilities after all filters, by sorting, in float64."""

    def normal(p):
        return p / p.sum()

    logits = logits.astype(np.float64) / temperature
    p = normal(np.exp(logits - logits.max()))
    if top_k:
        p = normal(np.where(p >= np.sort(p)[-top_k], p, 0))
    if top_p < 1:
        order = np.argsort(-p)
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        p = normal(p)
    p = normal(np.where(p >= min_p * p.max(), p, 0))
    if typical_p < 1:
        information = -np.log(np.where(p > 0, p, 1e-300))
        order = np.argsort(np.abs(information - (p * information).sum()))
        p[order[np.cumsum(p[order]) - p[order] >= typical_p]] = 0
    return normal(p)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.8},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.7},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_filters(options):
    logits, history = LOGITS[None], np.zeros((1, 1), np.int64)
    for process in from_settings(Settings(**options), starts=[1]):
        logits = process(history, logits)
    want = reference(LOGITS, **options)
    assert np.allclose(probabilities(logits[0]), want, rtol=1e-5, atol=0)
    check(multinomial(np.repeat(logits, DRAWS, axis=0), [np.random.default_rng(0)] * DRAWS), want)


def test_draws_from_a_large_vocabulary():
    row = (np.random.default_rng(1).normal(size=5000) * 3).astype(np.float32)
    row[1000:3000] = -np.inf
    random = np.random.default_rng(0)
    drawn = [int(multinomial(row[None], [random])[0]) for _ in range(DRAWS)]
    check(drawn, reference(row))


class Fixed:
    """A random generator that always gives the same number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


@pytest.mark.parametrize("size", [1, 3, 512, 513, 2000])
def test_ends_of_the_unit_interval(size):
    row = np.zeros((1, size + 2), np.float32)
    row[0, 0] = row[0, -1] = -np.inf
    assert multinomial(row, [Fixed(0.0)]) == [1]
    assert multinomial(row, [Fixed(np.nextafter(1, 0))]) == [size]


def test_a_row_does_not_depend_on_its_neighbours():
    rows = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    together = multinomial(rows, [np.random.default_rng(seed) for seed in (5, 6, 7)])
    alone = [int(multinomial(rows[i : i + 1], [np.random.default_rng(5 + i)])[0]) for i in range(3)]
    assert together.tolist() == alone
    assert together.dtype == np.int64


def test_greedy_takes_the_lowest_id_among_equals():
    assert greedy(np.array([[0, 2, 2], [3, -np.inf, 3]], np.float32)).tolist() == [1, 0]


def test_probabilities_of_damaged_logits():
    for row in ([np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]):
        with pytest.raises(Error, match="no token can be chosen"):
            probabilities(np.array(row, np.float32))


def test_accepting_drafts_keeps_the_models_distribution():
    random = np.random.default_rng(0)
    draft = reference((np.random.default_rng(4).normal(size=40) * 1.5).astype(np.float32), top_k=25)
    p = reference(LOGITS)
    proposed = random.choice(40, DRAWS, p=draft)
    found = [accept(int(token), draft, LOGITS, random) for token in proposed]
    check(np.array([token for token, _ in found]), p)
    accepted = np.array([kept for _, kept in found])
    share = np.minimum(p, draft).sum()
    # Four standard deviations.
    assert abs(accepted.mean() - share) < 4 * np.sqrt(share * (1 - share) / DRAWS)
    assert all(token == old for (token, kept), old in zip(found, proposed, strict=True) if kept)


def test_accepting_what_was_not_drawn():
    random, p = np.random.default_rng(0), reference(LOGITS)
    likely = int(p.argmax())
    found = [accept(likely, None, LOGITS, random) for _ in range(DRAWS)]
    check(np.array([token for token, _ in found]), p)
    assert all(kept == (token == likely) for token, kept in found)


def test_a_draft_that_equals_the_model_is_always_accepted():
    random, p = np.random.default_rng(0), probabilities(LOGITS)
    assert all(accept(token, p, LOGITS, random) == (token, True) for token in range(40))


def test_drafts_that_cannot_be():
    p = probabilities(LOGITS)
    with pytest.raises(BadOption, match=r"shape \(39,\), the model's \(40,\)"):
        accept(1, p[:39], LOGITS, np.random.default_rng(0))
    p[1] = 0
    with pytest.raises(BadOption, match=r"token 1 has probability 0\.0"):
        accept(1, p, LOGITS, np.random.default_rng(0))


@pytest.mark.parametrize("vocab", [40, 5000])
@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_p": 0.8},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8},
    ],
)
def test_drawing_among_few_equals_the_processors_one_by_one(vocab, count, options):
    settings = Settings(top_k=count, **options)
    logits = np.random.default_rng(0).normal(size=(200, vocab)).astype(np.float32) * 3
    forbidden = np.zeros(vocab, bool)
    forbidden[logits.argmax(axis=1)[:20]] = True
    full = logits
    for process in from_settings(settings, starts=[0] * 200, forbidden=forbidden):
        full = process(np.zeros((200, 0), np.int64), full)
    want = multinomial(full, [np.random.default_rng(i) for i in range(200)])
    few = warpers(dataclasses.replace(settings, top_k=0))
    got = draw_among(
        logits, [np.random.default_rng(i) for i in range(200)], count=count, warpers=few, forbidden=forbidden
    )
    assert got.tolist() == want.tolist()


def test_drawing_among_few_refuses_what_is_no_number():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(Error, match="no token can be chosen"):
            draw_among(np.full((1, 9), bad, np.float32), [np.random.default_rng(0)], count=2, warpers=())
