"""Processors agree with transformers' and are exact where it matters."""

import numpy as np
import pytest
import torch
from transformers import generation as hf

from ortlm.runtime import processors as ours
from ortlm.runtime.sampler import greedy, multinomial
from ortlm.runtime.settings import Settings

RNG = np.random.default_rng(0)
LOGITS = (RNG.normal(size=(3, 5000)) * 4).astype(np.float32)
HISTORY = RNG.integers(0, 5000, (3, 40))

PAIRS = [
    (ours.temperature(0.7), hf.TemperatureLogitsWarper(0.7)),
    (ours.top_k(50), hf.TopKLogitsWarper(50)),
    (ours.top_k(9000), hf.TopKLogitsWarper(9000)),
    (ours.top_p(0.9), hf.TopPLogitsWarper(0.9)),
    (ours.top_p(0.5), hf.TopPLogitsWarper(0.5)),
    (ours.top_p(0.001), hf.TopPLogitsWarper(0.001)),
    (ours.repetition_penalty(1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
]


@pytest.mark.parametrize(("process", "reference"), PAIRS)
def test_equals_transformers(process, reference):
    before = LOGITS.copy()
    got = process(HISTORY, LOGITS)
    want = reference(torch.tensor(HISTORY), torch.tensor(LOGITS)).numpy()
    assert got.dtype == np.float32
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    assert np.allclose(got, want, rtol=1e-6)
    assert np.array_equal(LOGITS, before)


def test_chain_equals_transformers():
    settings = Settings(temperature=0.6, top_k=40, top_p=0.8, repetition_penalty=1.1)
    got, want = LOGITS, torch.tensor(LOGITS)
    for process in ours.from_settings(settings):
        got = process(HISTORY, got)
    chain = (
        hf.RepetitionPenaltyLogitsProcessor(1.1),
        hf.TemperatureLogitsWarper(0.6),
        hf.TopKLogitsWarper(40),
        hf.TopPLogitsWarper(0.8),
    )
    for warp in chain:
        want = warp(torch.tensor(HISTORY), want)
    assert np.allclose(got, want.numpy(), rtol=1e-5)


def test_nucleus_is_exact_on_flat_distributions():
    flat = np.zeros((1, 1000), np.float32)
    flat[0, :10] = 1e-3
    kept = np.flatnonzero(np.isfinite(ours.top_p(0.9)(HISTORY[:1], flat)[0]))
    assert len(kept) == 900
    assert set(range(10)) <= set(kept.tolist())


def test_nucleus_keeps_one_token():
    sharp = np.full((1, 50), -100.0, np.float32)
    sharp[0, 7] = 100
    assert np.flatnonzero(np.isfinite(ours.top_p(0.01)(HISTORY[:1], sharp)[0])).tolist() == [7]


def test_repetition_penalty_passes_over_padding():
    history = np.array([[1, 2, -1, -1]])
    got = ours.repetition_penalty(2.0)(history, np.ones((1, 4), np.float32))
    assert got.tolist() == [[1, 0.5, 0.5, 1]]


def test_unknown_ids_come_first_and_are_never_drawn():
    chain = ours.from_settings(Settings(temperature=1.0), unknown_ids=np.array([0, 4999]))
    logits = LOGITS.copy()
    logits[:, 0] = 1e4
    for process in chain:
        logits = process(HISTORY, logits)
    assert 0 not in greedy(logits, RNG)
    assert 0 not in multinomial(logits, RNG)


def test_order_is_the_documented_one():
    names = [
        p.__qualname__.split(".")[0]
        for p in ours.from_settings(
            Settings(temperature=0.5, top_k=5, top_p=0.5, repetition_penalty=2.0), unknown_ids=np.array([1])
        )
    ]
    assert names == ["forbid", "repetition_penalty", "temperature", "top_k", "top_p"]
    assert ours.from_settings(Settings()) == []


def test_multinomial_follows_probabilities():
    logits = np.log(np.array([[0.1, 0.0, 0.6, 0.3]], np.float32) + np.float32(1e-30))
    logits[0, 1] = -np.inf
    rows = np.repeat(logits, 20_000, axis=0)
    drawn = multinomial(rows, np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.allclose(shares, [0.1, 0, 0.6, 0.3], atol=0.015)
    assert np.array_equal(drawn, multinomial(rows, np.random.default_rng(0)))
