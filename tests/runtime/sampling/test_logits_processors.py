"""Processors agree with transformers', change nothing they are given, and never make NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import generation as hf

from ortlm.errors import BadOption, Error
from ortlm.runtime.sampling import logits_processors as ours
from ortlm.runtime.sampling.sampler import greedy, multinomial
from ortlm.runtime.sampling.settings import Settings

RNG = np.random.default_rng(0)
SIZE, LENGTHS, STARTS = 5000, (40, 31, 1, 7), (10, 31, 1, 2)
LOGITS = (RNG.normal(size=(4, SIZE)) * 4).astype(np.float32)
# Some tokens are impossible; the second row has 30 possible ones, as under guidance.
LOGITS[0, ::7] = LOGITS[1, 30:] = -np.inf
HISTORY = np.full((4, 40), -1, np.int64)
for number, length in enumerate(LENGTHS):
    # Few different tokens, so that they repeat.
    HISTORY[number, :length] = RNG.integers(0, 9, length)
HISTORY[0, 5:11] = HISTORY[0, 34:40]
HISTORY[0, 11] = 3
for given_array in (LOGITS, HISTORY):
    given_array.flags.writeable = False

WORDS = [(5,), (6, 7), (int(HISTORY[0, 38]), int(HISTORY[0, 39]), 8), (2, int(HISTORY[3, 6]), 11), (4,)]
BIAS = {3: 1.5, 8: -2.0, 40: float("-inf")}

PAIRS = {
    "temperature": (ours.temperature(0.7), hf.TemperatureLogitsWarper(0.7)),
    "top_k": (ours.top_k(50), hf.TopKLogitsWarper(50)),
    "top_k 1": (ours.top_k(1), hf.TopKLogitsWarper(1)),
    "top_k above V": (ours.top_k(9000), hf.TopKLogitsWarper(9000)),
    "top_p": (ours.top_p(0.9), hf.TopPLogitsWarper(0.9)),
    "top_p almost all": (ours.top_p(0.9999), hf.TopPLogitsWarper(0.9999)),
    "top_p almost none": (ours.top_p(0.001), hf.TopPLogitsWarper(0.001)),
    "min_p": (ours.min_p(0.05), hf.MinPLogitsWarper(0.05)),
    "min_p 0": (ours.min_p(0.0), hf.MinPLogitsWarper(0.0)),
    "min_p 1": (ours.min_p(1.0), hf.MinPLogitsWarper(1.0)),
    "typical_p": (ours.typical_p(0.9), hf.TypicalLogitsWarper(0.9)),
    "typical_p small": (ours.typical_p(0.2), hf.TypicalLogitsWarper(0.2)),
    "repetition": (ours.repetition_penalty(1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
    "repetition below 1": (ours.repetition_penalty(0.7), hf.RepetitionPenaltyLogitsProcessor(0.7)),
    "ngram 1": (ours.no_repeat_ngram(1), hf.NoRepeatNGramLogitsProcessor(1)),
    "ngram 2": (ours.no_repeat_ngram(2), hf.NoRepeatNGramLogitsProcessor(2)),
    "ngram 7": (ours.no_repeat_ngram(7), hf.NoRepeatNGramLogitsProcessor(7)),
    "bad words": (ours.bad_words(WORDS, {4}), hf.NoBadWordsLogitsProcessor([*map(list, WORDS)], 4)),
    "min length": (ours.min_tokens(20, 0, STARTS, {2, 9}), hf.MinLengthLogitsProcessor(20, [2, 9])),
    "bias": (ours.logit_bias(BIAS), hf.SequenceBiasLogitsProcessor({(k,): v for k, v in BIAS.items()})),
}


def theirs(reference, history=HISTORY, logits=LOGITS):
    """Run transformers' processor on every row alone, without padding, in float64."""
    rows = [
        reference(torch.tensor(past[past >= 0])[None], torch.tensor(row[None].astype(np.float64)))
        for past, row in zip(history, logits, strict=True)
    ]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("name", PAIRS)
def test_equals_transformers(name):
    process, reference = PAIRS[name]
    got, want = process(HISTORY, LOGITS), theirs(reference)
    assert got.dtype == np.float32
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    assert np.allclose(got, want, rtol=1e-6)
    assert not np.array_equal(got, LOGITS) or name in ("top_k above V", "min_p 0")


def test_min_new_tokens_equals_transformers():
    got = ours.min_tokens(0, 6, STARTS, {2, 9})(HISTORY, LOGITS)
    for row, start in enumerate(STARTS):
        reference = hf.MinNewTokensLengthLogitsProcessor(start, 6, [2, 9])
        want = theirs(reference, HISTORY[row : row + 1], LOGITS[row : row + 1])
        assert np.array_equal(got[row : row + 1], want)


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3),
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_patterns_equal_transformers(pasts, size, words):
    history = np.full((len(pasts), max(map(len, pasts))), -1, np.int64)
    for row, past in zip(history, pasts, strict=True):
        row[: len(past)] = past
    logits = np.zeros((len(pasts), 4), np.float32)
    for process, reference in (
        (ours.no_repeat_ngram(size), hf.NoRepeatNGramLogitsProcessor(size)),
        (ours.bad_words(words), hf.NoBadWordsLogitsProcessor(words)),
    ):
        assert np.array_equal(process(history, logits), theirs(reference, history, logits))


def test_chain_equals_transformers():
    settings = Settings(
        temperature=0.6, top_k=40, top_p=0.8, min_p=0.02, typical_p=0.9, repetition_penalty=1.1
    )
    got, want = LOGITS, LOGITS
    for process in ours.from_settings(settings, starts=STARTS):
        got = process(HISTORY, got)
    for warp in (
        hf.RepetitionPenaltyLogitsProcessor(1.1),
        hf.TemperatureLogitsWarper(0.6),
        hf.TopKLogitsWarper(40),
        hf.TopPLogitsWarper(0.8),
        hf.MinPLogitsWarper(0.02),
        hf.TypicalLogitsWarper(0.9),
    ):
        want = theirs(warp, HISTORY, want)
    assert np.allclose(got, want, rtol=1e-5)


def test_order_is_the_documented_one():
    def mine(history, logits):
        return logits

    def guide(history, logits):
        return logits

    settings = Settings(
        bad_words=[[1]], min_length=1, repetition_penalty=2.0, presence_penalty=1.0, no_repeat_ngram_size=2,
        logit_bias={1: 1}, processors=mine, temperature=0.5, top_k=5, top_p=0.5, min_p=0.5, typical_p=0.5,
    )  # fmt: skip
    chain = ours.from_settings(settings, starts=[1], forbidden=np.arange(6) == 1, guide=guide)
    assert [process.__qualname__.split(".<locals>.process")[0] for process in chain] == [
        "forbid", guide.__qualname__, "bad_words", "min_tokens", "repetition_penalty", "occurrence_penalty",
        "no_repeat_ngram", "logit_bias", "custom", "temperature", "top_k", "top_p", "min_p", "typical_p",
    ]  # fmt: skip
    neutral = Settings(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0)
    assert ours.from_settings(neutral, starts=[1]) == ours.from_settings(Settings(), starts=[1]) == []
    greedy_only = Settings(do_sample=False, top_k=5, min_p=0.5)
    assert ours.from_settings(greedy_only, starts=[1]) == []


def test_occurrence_counts_in_the_answer_only():
    history = np.array([[3, 3, 1, 1, 2, -1], [0, 1, 2, 3, 3, 3]])
    got = ours.occurrence_penalty(0.5, 2.0, [2, 4])(history, np.zeros((2, 4), np.float32))
    assert got.tolist() == [[0, -4.5, -2.5, 0], [0, 0, 0, -4.5]]


def test_nucleus_is_exact_on_flat_distributions():
    flat = np.zeros((1, 20_000), np.float32)
    flat[0, 5000:5010] = 1e-3
    kept = np.flatnonzero(np.isfinite(ours.top_p(0.9)(HISTORY[:1], flat)[0]))
    # Among equals the lowest ids.
    assert kept.tolist() == [*range(5000), *range(5000, 5010), *range(5010, 18_000)]


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
def test_nucleus_of_few_tokens_equals_that_of_each_row(p):
    logits = np.random.default_rng(0).normal(size=(6, 300), scale=3).astype(np.float32)
    logits[1] = logits[1].round()
    logits[2, 5:] = -np.inf
    logits[3] = -np.inf
    logits[4, 7] = np.nan
    found = ours._nuclei(logits, p)
    wanted = ours._keep(logits, lambda row: ours._nucleus(row, p))
    np.testing.assert_array_equal(found, wanted)


def test_nucleus_keeps_one_token():
    sharp = np.full((1, 50), -100.0, np.float32)
    sharp[0, 7] = 100
    assert np.flatnonzero(np.isfinite(ours.top_p(0.01)(HISTORY[:1], sharp)[0])).tolist() == [7]


def test_unknown_ids_come_first_and_are_never_drawn():
    chain = ours.from_settings(
        Settings(temperature=1.0), starts=STARTS, forbidden=np.isin(np.arange(5000), [0, 4999])
    )
    logits = LOGITS.copy()
    logits[:, 0] = 1e4
    for process in chain:
        logits = process(HISTORY, logits)
    assert 0 not in greedy(logits)
    assert 0 not in multinomial(logits, [RNG] * 4)


def test_bias_of_infinity_leaves_nothing_else():
    logits = np.array([[1, 2, 3, 4], [1, -np.inf, -np.inf, 4]], np.float32)
    got = ours.logit_bias({1: float("inf"), 2: 1e300, 3: 9})(HISTORY[:2], logits)
    never = -np.inf
    # What is forbidden already is not brought back: the second row has no such token left.
    assert got.tolist() == [[never, 2, 3, never], [1, never, never, 13]]


@pytest.mark.parametrize(("name", "found"), [("logit_bias", {7: 1.0}), ("bad_words", [(1, 7), (7, 1)])])
def test_ids_outside_the_vocabulary(name, found):
    (process,) = ours.from_settings(Settings(**{name: found}), starts=[1])
    with pytest.raises(BadOption, match=rf"{name} names token 7, .* 0 … 3"):
        process(HISTORY[:1], np.zeros((1, 4), np.float32))


def test_bad_words_that_are_texts_need_a_tokenizer():
    with pytest.raises(BadOption, match="'word' needs a tokenizer"):
        ours.from_settings(Settings(bad_words=["word"]), starts=[1])


@pytest.mark.parametrize("row", [[-np.inf] * 50, [1.0] * 49 + [np.nan], [np.nan] * 50])
@pytest.mark.parametrize("heat", [1e-40, 0.7])
def test_rows_that_cannot_be_answered_reach_the_sampler(row, heat):
    settings = Settings(
        temperature=heat, top_k=5, top_p=0.5, min_p=0.1, typical_p=0.5, repetition_penalty=2.0,
        frequency_penalty=-1.0, no_repeat_ngram_size=2, logit_bias={5: 3, 6: float("inf")}, min_length=99,
    )  # fmt: skip
    logits = np.array([row], np.float32)
    for process in ours.from_settings(settings, starts=[3], stop_ids=[2, 99]):
        logits = process(HISTORY[:1, :20], logits)
    for sampler in (greedy, multinomial):
        with pytest.raises(Error, match="no token can be chosen"):
            sampler(logits, [RNG])


@pytest.mark.parametrize("value", [1e-46, 1e30, 1e300])
def test_penalties_and_temperatures_out_of_measure_make_no_nan(value):
    for process in (ours.temperature(value), ours.repetition_penalty(value)):
        got = process(HISTORY, LOGITS)
        assert not np.isnan(got).any()
        assert (got[np.isneginf(LOGITS)] == -np.inf).all()


def doubled(history, logits):
    return logits.astype(np.float64) * 2


def in_place(history, logits):
    logits *= 2
    return logits


@pytest.mark.parametrize("function", [doubled, in_place, lambda h, x: (x * 2).astype(np.float32)])
def test_callers_own_processors(function):
    (process,) = ours.from_settings(Settings(processors=function), starts=STARTS)
    got = process(HISTORY, LOGITS)
    assert got.dtype == np.float32
    assert np.array_equal(got, LOGITS * 2)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "it returned NoneType"),
        ([[0.0] * 4], "it returned list"),
        (torch.zeros(1, 4), "it returned Tensor"),
        (np.zeros(4), r"it returned float64 \(4,\)"),
        (np.zeros((1, 4), np.int64), r"it returned int64 \(1, 4\)"),
    ],
)
def test_callers_own_processors_that_return_something_else(returned, said):
    process = ours.custom(lambda history, logits: returned)
    with pytest.raises(BadOption, match=rf"processor .*<lambda> must return .* shape \(1, 4\), but {said}"):
        process(HISTORY[:1], np.zeros((1, 4), np.float32))


def test_callers_own_processors_cannot_change_the_history():
    def change(history, logits):
        history[0, 0] = 5
        return logits

    history = np.zeros((1, 3), np.int64)
    with pytest.raises(ValueError, match="read-only"):
        ours.custom(change)(history, np.zeros((1, 4), np.float32))
    assert history.flags.writeable


def test_double_precision_beyond_float32():
    got = ours.custom(lambda h, x: np.where(x > 0, 1.0, -1e300))(
        HISTORY[:1], np.ones((1, 2), np.float32) * [1, -1]
    )
    assert got.tolist() == [[1, -np.inf]]
