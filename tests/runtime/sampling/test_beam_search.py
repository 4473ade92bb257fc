"""Beams against transformers on a model that is a table, and diverse beams against the plain algorithm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ortlm.errors import Error
from ortlm.runtime.sampling.beam_search import Beams, Hypothesis
from ortlm.runtime.sampling.logits_processors import from_settings
from ortlm.runtime.sampling.settings import Settings
from tests.runtime.sampling import plain_beams


class TableModel(PreTrainedModel, GenerationMixin):
    """Logits float32 [V] of the next token by the last two."""

    config_class = PretrainedConfig

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(PretrainedConfig(vocab_size=len(table)))
        self.table = torch.from_numpy(table)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return CausalLMOutputWithPast(logits=self.table[input_ids[:, -2], input_ids[:, -1]][:, None])

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        return {"input_ids": input_ids}


def make_table(random: np.random.Generator, vocab: int, stop_ids: list[int], bias: float) -> np.ndarray:
    table = random.normal(size=(vocab, vocab, vocab)).astype(np.float32) * 2
    table[:, :, stop_ids] += np.float32(bias)
    return table


def search(
    table: np.ndarray,
    prompts: list[list[int]],
    settings: Settings,
    *,
    stop_ids: Any = (),
    limits: Any = None,
    seed: int = 0,
    processors: Any = None,
    steps: int = 1000,
) -> Beams:
    """Run a search as a generation loop does, for at most ``steps``."""
    width = settings.num_beams
    beams = Beams(
        prompts=len(prompts),
        settings=settings,
        stop_ids=stop_ids,
        starts=[len(prompt) for prompt in prompts],
        limits=limits or [settings.max_new_tokens] * len(prompts),
        processors=from_settings(settings, starts=[len(prompt) for prompt in prompts for _ in range(width)])
        if processors is None
        else processors,
        randoms=[np.random.default_rng(seed + i) for i in range(len(prompts))],
    )
    rows = [list(prompt) for prompt in prompts for _ in range(width)]
    for _ in range(steps):
        if beams.finished:
            break
        history = np.full((len(rows), max(map(len, rows))), -1)
        for padded, row in zip(history, rows, strict=True):
            padded[: len(row)] = row
        logits = table[[row[-2] for row in rows], [row[-1] for row in rows]]
        tokens, parents = beams.step(history, logits)
        assert (parents // width == np.arange(len(rows)) // width).all()
        rows = [[*rows[parent], int(token)] for parent, token in zip(parents, tokens, strict=True)]
    return beams


def transformers(
    table: np.ndarray, prompts: list[list[int]], settings: Settings, *, stop_ids: Any = (), **more: Any
) -> list[list[tuple[tuple[int, ...], float]]]:
    """Return the new tokens and the score of every answer of ``generate``."""
    ids, count = torch.tensor(prompts), settings.num_return_sequences
    with torch.no_grad():
        out = TableModel(table).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            num_beams=settings.num_beams,
            num_return_sequences=count,
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
            max_new_tokens=settings.max_new_tokens,
            repetition_penalty=settings.repetition_penalty or 1.0,
            do_sample=settings.samples,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **more,
        )
    lengths = (out.beam_indices >= 0).sum(dim=1).tolist()
    made = [
        (tuple(row[ids.shape[1] :][:length].tolist()), score)
        for row, length, score in zip(out.sequences, lengths, out.sequences_scores.tolist(), strict=True)
    ]
    return [made[at : at + count] for at in range(0, len(made), count)]


def assert_equal(got: list[list[Hypothesis]], want: Any, stop_ids: Any = ()) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert [found.tokens for found in ours] == [tokens for tokens, _ in theirs]
        assert [found.score for found in ours] == pytest.approx(
            [score for _, score in theirs], rel=1e-5, abs=1e-6
        )
        assert [found.stopped for found in ours] == [tokens[-1] in stop_ids for tokens, _ in theirs]


def random_case(random: np.random.Generator, **fixed: Any) -> tuple[Any, Any, Settings, list[int]]:
    vocab = int(random.integers(24, 40))
    stop_ids = random.choice(vocab, int(random.integers(0, 4)), replace=False).tolist()
    table = make_table(random, vocab, stop_ids, random.choice([0.0, 1.0, 3.0]))
    prompts = random.integers(0, vocab, (int(random.integers(1, 4)), 3)).tolist()
    width = int(random.integers(2, 6))
    options = {
        "num_beams": width,
        "num_return_sequences": int(random.integers(1, width + 1)),
        "length_penalty": random.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": [True, False, "never"][random.integers(3)],
        "max_new_tokens": int(random.choice([1, 2, 5, 12])),
        "repetition_penalty": random.choice([1.0, 1.2]),
    }
    return table, prompts, Settings(**(options | fixed)), stop_ids


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_transformers(seed: int) -> None:
    """Random settings, one to three prompts at once."""
    for number in range(12):
        table, prompts, settings, stop_ids = random_case(np.random.default_rng([seed, number]))
        got = search(table, prompts, settings, stop_ids=stop_ids).best()
        assert_equal(got, transformers(table, prompts, settings, stop_ids=stop_ids), stop_ids)


@pytest.mark.parametrize("seed", range(4))
def test_samples_like_transformers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same noise, transformers draws the same beams."""
    for number in range(8):
        table, prompts, settings, stop_ids = random_case(
            np.random.default_rng([seed, number]), do_sample=True
        )
        randoms = [np.random.default_rng(7 + i) for i in range(len(prompts))]

        def draw(p: Any, num_samples: int, randoms: Any = randoms) -> Any:
            keys = torch.log(p.double())
            for row, random in zip(keys, randoms, strict=True):
                possible = row > -torch.inf
                row[possible] -= torch.from_numpy(np.log(random.standard_exponential(int(possible.sum()))))
            return keys.topk(num_samples).indices

        monkeypatch.setattr(torch, "multinomial", draw)
        want = transformers(table, prompts, settings, stop_ids=stop_ids, top_k=0)
        got = search(table, prompts, settings, stop_ids=stop_ids, seed=7).best()
        assert_equal(got, want, stop_ids)


def test_draws_without_replacement_by_probability() -> None:
    """Four are drawn for two beams, as often as with torch's multinomial; the two most likely of them continue."""
    table = np.broadcast_to(np.log([0.4, 0.3, 0.15, 0.1, 0.05]), (5, 5, 5)).astype(np.float32)
    settings = Settings(num_beams=2, do_sample=True, num_return_sequences=2, max_new_tokens=1)
    counts = np.zeros((5, 5))
    for seed in range(3000):
        first, second = search(table, [[0, 0]], settings, seed=seed).best()[0]
        counts[first.tokens[0], second.tokens[0]] += 1
    torch.manual_seed(0)
    drawn = torch.multinomial(torch.from_numpy(table[0, 0]).exp().expand(30000, 5), 4).sort().values[:, :2]
    want = np.zeros((5, 5))
    np.add.at(want, tuple(drawn.numpy().T), 1 / 30000)
    assert np.abs(counts / 3000 - want).max() < 0.03


@pytest.mark.parametrize("seed", range(6))
def test_diverse_beams(seed: int) -> None:
    for number in range(8):
        random = np.random.default_rng([seed, number])
        groups, size = int(random.integers(2, 4)), int(random.integers(1, 4))
        table, prompts, settings, stop_ids = random_case(
            random,
            num_beams=groups * size,
            num_return_sequences=groups,
            num_beam_groups=groups,
            diversity_penalty=random.choice([0.0, 0.5, 4.0]),
            repetition_penalty=1.0,
        )
        want = [plain_beams.diverse(table, prompt, settings, stop_ids) for prompt in prompts]
        assert_equal(search(table, prompts, settings, stop_ids=stop_ids).best(), want, stop_ids)


def test_groups_differ_by_what_the_penalty_takes() -> None:
    table = make_table(np.random.default_rng(1), 30, [], 0)
    wanted = {"num_beams": 4, "num_beam_groups": 4, "num_return_sequences": 4, "max_new_tokens": 3}
    alike = search(table, [[1, 2]], Settings(**wanted)).best()[0]
    assert len({found.tokens for found in alike}) == 1
    other = search(table, [[1, 2]], Settings(**wanted, diversity_penalty=100.0)).best()[0]
    for step in range(3):
        assert len({found.tokens[step] for found in other}) == 4


@pytest.mark.parametrize("groups", [1, 2])
def test_prompts_of_different_lengths_and_limits(groups: int) -> None:
    """A batch gives what each prompt gives alone, whichever ends first."""
    random = np.random.default_rng(5)
    table = make_table(random, 30, [3], 1.5)
    prompts, limits = [random.integers(4, 30, n).tolist() for n in (2, 9, 5, 3)], [12, 3, 8, 1]
    settings = Settings(num_beams=4, num_beam_groups=groups, num_return_sequences=2, repetition_penalty=1.1)
    together = search(table, prompts, settings, stop_ids=[3], limits=limits)
    assert together.ended == [True] * 4
    for prompt, limit, found in zip(prompts, limits, together.best(), strict=True):
        assert found == search(table, [prompt], settings, stop_ids=[3], limits=[limit]).best()[0]
        assert max(len(hypothesis.tokens) for hypothesis in found) <= limit


def test_all_that_end_in_the_completing_step_compete() -> None:
    """With early stopping, the second of two that end at once may still oust an older, worse one."""
    scores = {(): {1: -0.4, 0: -1.5, 2: -2.2}, (1,): {0: -0.1, 3: -2.4}, (2,): {0: -0.1, 3: -2.4}}
    table = np.full((5, 5, 5), -60, np.float32)
    for past, row in scores.items():
        for token, score in row.items():
            table[(4, 4, *past)[-2:]][token] = score
    settings = Settings(
        num_beams=2, num_return_sequences=2, early_stopping=True, length_penalty=2.0, max_new_tokens=9
    )
    got = search(table, [[4, 4]], settings, stop_ids=[0]).best()
    assert [found.tokens for found in got[0]] == [(1, 0), (2, 0)]
    assert_equal(got, transformers(table, [[4, 4]], settings, stop_ids=[0]), [0])


def test_the_end_at_once() -> None:
    """A stop token at the first step is an answer of one token."""
    table = make_table(np.random.default_rng(0), 30, [5], 20.0)
    settings = Settings(num_beams=2, max_new_tokens=6, num_return_sequences=2)
    got = search(table, [[1, 2]], settings, stop_ids=[5]).best()
    assert got[0][0].tokens == (5,)
    assert_equal(got, transformers(table, [[1, 2]], settings, stop_ids=[5]), [5])


@pytest.mark.parametrize("groups", [1, 2])
def test_before_the_end_what_runs_counts(groups: int) -> None:
    table = make_table(np.random.default_rng(2), 30, [], 0)
    settings = Settings(num_beams=4, num_beam_groups=groups, num_return_sequences=3, max_new_tokens=9)
    begun = search(table, [[1, 2]], settings, steps=4)
    assert begun.ended == [False]
    short = Settings.of(settings, {"max_new_tokens": 4})
    assert begun.best() == search(table, [[1, 2]], short).best()
    assert begun.best() == begun.best()
    assert search(table, [[1, 2]], settings, steps=0).best()[0][0] == Hypothesis((), 0.0, stopped=False)


def test_no_tokens_wanted() -> None:
    beams = search(np.zeros((3, 3, 3), np.float32), [[1, 2]], Settings(num_beams=3), limits=[0])
    assert beams.finished
    assert beams.best() == [[Hypothesis((), 0.0, stopped=False)]]


def test_equal_scores_take_the_lower_token() -> None:
    settings = Settings(num_beams=3, num_return_sequences=3, max_new_tokens=1)
    got = search(np.zeros((9, 9, 9), np.float32), [[1, 2]], settings).best()[0]
    assert [found.tokens for found in got] == [(0,), (1,), (2,)]


@pytest.mark.parametrize("groups", [1, 2])
def test_fewer_tokens_allowed_than_beams(groups: int) -> None:
    """Nothing that is forbidden, and nothing twice within a group, is an answer."""

    def allow(history: Any, scores: Any) -> Any:
        out = np.full_like(scores, -np.inf)
        allowed = [3, 5] if history.shape[1] == 2 else [7]
        out[:, allowed] = scores[:, allowed]
        return out

    table = make_table(np.random.default_rng(0), 30, [7], 0)
    settings = Settings(num_beams=6, num_beam_groups=groups, num_return_sequences=6, max_new_tokens=5)
    got = search(table, [[1, 2]], settings, stop_ids=[7], processors=[allow]).best()[0]
    assert sorted(found.tokens for found in got) == sorted([(3, 7), (5, 7)] * groups)
    assert all(found.stopped for found in got)


@pytest.mark.parametrize(("value", "says"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "forbid all")])
def test_nothing_to_choose(value: float, says: str) -> None:
    processors = [lambda history, scores: np.full_like(scores, value)]
    with pytest.raises(Error, match=says):
        search(
            np.zeros((5, 5, 5), np.float32),
            [[1, 2]],
            Settings(num_beams=2),
            limits=[3],
            processors=processors,
        )


@pytest.mark.parametrize("penalty", [300.0, -300.0])
def test_extreme_length_penalty(penalty: float) -> None:
    table = make_table(np.random.default_rng(0), 30, [4], 1)
    settings = Settings(num_beams=3, num_return_sequences=3, length_penalty=penalty, max_new_tokens=20)
    got = search(table, [[1, 2]], settings, stop_ids=[4]).best()[0]
    assert np.isfinite([found.score for found in got]).all()


def test_processors_see_the_history_of_their_rows() -> None:
    seen = []

    def look(history: Any, scores: Any) -> Any:
        seen.append(history.copy())
        np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-5)
        return scores

    table = make_table(np.random.default_rng(3), 30, [], 0)
    settings = Settings(num_beams=2, num_return_sequences=2, max_new_tokens=5)
    got = search(table, [[1, 2], [3, 4, 5]], settings, processors=[look]).best()
    assert [history.shape for history in seen] == [(4, n) for n in range(3, 8)]
    assert seen[-1][0, -1] == -1
    starts = {tuple(row[2:6]) for row in seen[-1][:2]}
    assert {found.tokens[:4] for found in got[0]} <= starts
