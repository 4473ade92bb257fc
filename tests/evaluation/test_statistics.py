"""The statistics against their definitions, and against resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ortlm.evaluation.statistics import Scores, sections, statistics


def made(count: int = 4000, seed: int = 0) -> Scores:
    random = np.random.default_rng(seed)
    base = random.gamma(1.0, 1.5, count)
    nll = np.abs(base + 0.2 * random.normal(size=count) + 0.05)
    return Scores(nll, base, random.gamma(0.5, 0.1, count), random.random(count) < 0.9)


def test_values_are_those_of_the_definitions() -> None:
    scores = made()
    found = statistics(scores)
    delta = 100 * (np.exp(-scores.nll) - np.exp(-scores.base_nll))
    assert found.ppl.value == pytest.approx(math.exp(scores.nll.mean()))
    assert found.ppl_ratio.value == pytest.approx(math.exp((scores.nll - scores.base_nll).mean()))
    assert found.correlation == pytest.approx(np.corrcoef(scores.nll, scores.base_nll)[0, 1])
    assert found.delta_p_rms.value == pytest.approx(math.sqrt((delta**2).mean()))
    assert dict(found.kld_percentiles)[50.0] == np.median(scores.kld)
    assert dict(found.kld_percentiles)[100.0] == scores.kld.max()
    assert dict(found.delta_p_percentiles)[0.0] == delta.min()
    assert found.same_top.value == pytest.approx(100 * scores.same_top.mean())


@pytest.mark.parametrize(
    "name",
    [
        "ppl",
        "base_ppl",
        "ln_ppl_ratio",
        "ppl_ratio",
        "ppl_difference",
        "kld",
        "delta_p",
        "delta_p_rms",
        "same_top",
    ],
)
def test_errors_are_those_of_resampling(name: str) -> None:
    """Drawing the tokens again, both models' together, spreads each figure as far as its error says."""
    scores, random = made(), np.random.default_rng(1)
    drawn = []
    for _ in range(400):
        i = random.integers(0, len(scores.nll), len(scores.nll))
        again = Scores(scores.nll[i], scores.base_nll[i], scores.kld[i], scores.same_top[i])
        drawn.append(getattr(statistics(again), name).value)
    assert getattr(statistics(scores), name).error == pytest.approx(np.std(drawn), rel=0.15)


def test_equal_models() -> None:
    scores = made()
    same = Scores(scores.nll, scores.nll, 0 * scores.kld, np.ones_like(scores.same_top))
    found = statistics(same)
    assert (found.ppl_ratio.value, found.kld.value, found.same_top.value) == (1, 0, 100)
    assert found.ln_ppl_ratio.error == pytest.approx(0, abs=1e-9)
    assert (found.delta_p_rms.value, found.delta_p_rms.error) == (0, 0)


def test_numbers_that_json_cannot_say_are_null() -> None:
    scores = made()
    found = statistics(Scores(scores.nll + 800, scores.base_nll * 0, scores.kld, scores.same_top)).to_dict()
    assert found["ppl"]["value"] is None
    assert found["correlation"] is None
    assert found["kld"]["low"] < found["kld"]["value"] < found["kld"]["high"]


def test_names_are_those_of_llama_perplexity() -> None:
    titles = sections(statistics(made()))
    names = [name for _, rows in titles for name, _, _ in rows]
    assert [title for title, _ in titles] == [
        "Perplexity statistics", "KL divergence statistics", "Token probability statistics",
    ]  # fmt: skip
    assert names[:8] == [
        "Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean ln(PPL(Q)/PPL(base))",
        "Mean PPL(Q)/PPL(base)", "Mean PPL(Q)-PPL(base)", "Mean KLD", "Maximum KLD",
    ]  # fmt: skip
    assert {"99.9% KLD", "Median KLD", "0.1% KLD", "Minimum KLD", "75.0% Δp", "RMS Δp", "Same top p"} <= set(
        names
    )
