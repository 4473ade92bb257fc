"""Greedy and beam search with everything that steers them, token by token against ``transformers.generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import ortlm
from ortlm import Guidance
from ortlm.runtime.sampling.settings import Settings
from tests.architectures import oracle

FAMILIES = [
    "phi3",
    "phi-2",
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gemma4-e",
    "qwen2",
    "qwen3",
    "granite",
    "olmo2",
]
PROMPT, NEW = 9, 14

# Under the names that both sides share. "stops" says how many stop tokens there are, "bad_words" how many
# sequences are forbidden; the model under test decides which, see Subject.
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-3-stops": {"stops": 3},
    "greedy-repetition": {"repetition_penalty": 1.3},
    "greedy-repetition-wanted": {"repetition_penalty": 0.8},
    "greedy-no-2-grams": {"no_repeat_ngram_size": 2},
    "greedy-no-3-grams-repetition": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1},
    "greedy-min-new": {"min_new_tokens": 8, "stops": 3},
    "greedy-min-length": {"min_length": 20},
    "greedy-max-length": {"max_length": 13},
    "greedy-bad-words": {"bad_words": 3},
    "greedy-all": {
        "bad_words": 2,
        "min_new_tokens": 5,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.2,
        "stops": 2,
    },
    "beams-2": {"num_beams": 2},
    "beams-3-all": {"num_beams": 3, "num_return_sequences": 3, "stops": 2},
    "early": {"num_beams": 4, "early_stopping": True, "stops": 3},
    "early-sum": {
        "num_beams": 4,
        "early_stopping": True,
        "num_return_sequences": 4,
        "length_penalty": 0.0,
        "stops": 3,
    },
    "early-short": {"num_beams": 3, "early_stopping": True, "length_penalty": -1.0},
    "early-long": {
        "num_beams": 3,
        "early_stopping": True,
        "length_penalty": 2.0,
        "num_return_sequences": 3,
        "stops": 3,
    },
    "never": {"num_beams": 3, "early_stopping": "never", "stops": 2},
    "never-short": {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    "never-long": {
        "num_beams": 4,
        "early_stopping": "never",
        "length_penalty": 2.0,
        "num_return_sequences": 2,
    },
    "long": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 4},
    "root": {"num_beams": 3, "length_penalty": 0.5, "num_return_sequences": 2, "stops": 3},
    "short": {"num_beams": 3, "length_penalty": -1.0},
    "beams-repetition": {"num_beams": 3, "repetition_penalty": 1.4, "num_return_sequences": 2},
    "beams-no-2-grams": {"num_beams": 3, "no_repeat_ngram_size": 2},
    "beams-no-3-grams": {"num_beams": 2, "no_repeat_ngram_size": 3, "length_penalty": 2.0},
    "beams-min-new": {"num_beams": 3, "min_new_tokens": 7, "stops": 3},
    "beams-min-max-length": {"num_beams": 4, "min_length": 19, "max_length": 22},
    "beams-bad-words": {"num_beams": 3, "bad_words": 3, "num_return_sequences": 2},
    "beams-one-token": {"num_beams": 5, "max_new_tokens": 1, "num_return_sequences": 5},
    "beams-all": {
        "num_beams": 4,
        "num_return_sequences": 3,
        "length_penalty": 0.5,
        "early_stopping": True,
        "bad_words": 2,
        "min_new_tokens": 4,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.2,
        "stops": 3,
    },
}


@dataclass(frozen=True)
class Subject:
    """One architecture on both sides, and tokens that it writes by itself."""

    lm: ortlm.LanguageModel
    model: Any
    prompt: list[int]
    free: list[int]
    unknown: list[int]

    def settings(self, **options: Any) -> Settings:
        """Fill in what depends on the model: stop tokens and bad words that it would choose."""
        free = self.free
        asked = {"max_new_tokens": None if "max_length" in options else NEW, **options}
        # Late ones, so that something happens before; and one that is likely anywhere.
        asked["stop_token_ids"] = [free[6], free[9], free[4]][: asked.pop("stops", 1)]
        asked["bad_words"] = [free[2:3], free[0:2], free[3:6]][: asked.pop("bad_words", 0)]
        return Settings(**asked)


@pytest.fixture(scope="module")
def subject(saved: Any, build: Any) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            lm = build(name)
            unknown = lm.tokenizer.unknown_ids(lm.vocab_size).tolist()
            prompts = [oracle.random_tokens(PROMPT, seed=seed) for seed in range(12)]
            written = [run(lm, [prompt], Settings(max_new_tokens=NEW))[0][0] for prompt in prompts]
            # Random models like to repeat themselves; what repeats least has most to steer.
            prompt, free = max(zip(prompts, written, strict=True), key=lambda pair: len(set(pair[1])))
            made[name] = Subject(lm, saved(name).model, prompt, free, unknown)
        return made[name]

    return get


def run(lm: ortlm.LanguageModel, prompts: Sequence[list[int]], settings: Settings) -> list[list[list[int]]]:
    """Return the new tokens of every answer to every prompt."""
    made = lm.generate_batch(prompts, settings=settings, ignore_eos=True)
    return [[list(answer.token_ids) for answer in (best, *best.alternatives)] for best in made]


def reference(subject: Subject, prompt: list[int], settings: Settings) -> list[list[int]]:
    """Return the new tokens of every answer of transformers to one prompt."""
    ids, ends = torch.tensor([prompt]), list(settings.stop_token_ids)
    beams: dict[str, Any] = {
        "num_beams": settings.num_beams,
        "num_return_sequences": settings.num_return_sequences,
        "length_penalty": settings.length_penalty,
        "early_stopping": settings.early_stopping,
        "output_scores": True,
    }
    with torch.no_grad():
        out = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_length=settings.max_length or len(prompt) + (settings.max_new_tokens or 0),
            min_length=settings.min_length,
            min_new_tokens=settings.min_new_tokens or None,
            repetition_penalty=settings.repetition_penalty or 1.0,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
            bad_words_ids=[list(word) for word in settings.bad_words] or None,
            suppress_tokens=subject.unknown or None,
            eos_token_id=ends or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            **(beams if settings.num_beams > 1 else {}),
        )
    rows = out.sequences[:, len(prompt) :].tolist()
    if settings.num_beams == 1:
        return rows
    # Shorter answers are filled up with a token that might be theirs; only these indices tell.
    lengths = (out.beam_indices >= 0).sum(dim=1).tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_transformers(name: str, options: dict[str, Any], subject: Any) -> None:
    this = subject(name)
    settings = this.settings(**options)
    assert run(this.lm, [this.prompt], settings)[0] == reference(this, this.prompt, settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_settings_matter(name: str, subject: Any) -> None:
    """Otherwise equality would prove little: stop tokens end answers, and most settings change the result."""
    this = subject(name)
    results = [run(this.lm, [this.prompt], this.settings(**options))[0] for options in SETTINGS.values()]
    assert len({str(found) for found in results}) > 0.6 * len(SETTINGS)
    ends = {this.free[at] for at in (4, 6, 9)}
    answers = [answer for found in results for answer in found]
    assert 0.1 < np.mean([answer[-1] in ends for answer in answers]) < 1


@pytest.mark.parametrize("options", ["beams-3-all", "early-sum", "never", "long", "beams-repetition"])
@pytest.mark.parametrize("name", ["phi3", "mistral", "gemma3", "gemma4-e", "gemma3n"])
def test_a_batch_equals_its_prompts(name: str, options: str, subject: Any) -> None:
    """Prompts of different lengths, each as transformers continues it alone."""
    this = subject(name)
    settings = this.settings(**SETTINGS[options])
    prompts = [this.prompt[:5], this.prompt, oracle.random_tokens(12, seed=4)]
    together = run(this.lm, prompts, settings)
    assert together == [run(this.lm, [prompt], settings)[0] for prompt in prompts]
    assert together == [reference(this, prompt, settings) for prompt in prompts]


def test_scores_are_those_of_transformers(saved: Any, build: Any) -> None:
    model, lm = saved("qwen3").model, build("qwen3")
    prompt = oracle.random_tokens(9)
    made = lm.generate(prompt, max_new_tokens=8, ignore_eos=True, num_beams=4, num_return_sequences=4)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, num_beams=4,
            num_return_sequences=4, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
            output_scores=True, suppress_tokens=lm.tokenizer.unknown_ids(lm.vocab_size).tolist() or None,
        ).sequences_scores  # fmt: skip
    got = [answer.score for answer in (made, *made.alternatives)]
    assert got == pytest.approx(want.tolist(), rel=1e-4)


def test_beam_sampling_follows_the_seed(build: Any) -> None:
    lm = build("llama")
    prompt = oracle.random_tokens(9)
    options = {"num_beams": 3, "temperature": 2.0, "max_new_tokens": 8, "ignore_eos": True}
    one, again, other = (lm.generate(prompt, seed=seed, **options).token_ids for seed in (1, 1, 2))
    assert one == again != other
    # Nearly without randomness it is beam search.
    cold = lm.generate(prompt, seed=1, **{**options, "temperature": 1e-4}).token_ids
    assert len(cold) == 8


def test_an_unfinished_search_gives_what_runs(build: Any) -> None:
    lm = build("llama")
    generator = lm.generator(num_beams=3, num_return_sequences=2, ignore_eos=True)
    generator.append(oracle.random_tokens(5))
    for _ in range(4):
        generator.step()
    answers = generator.answers()[0]
    assert [(len(answer.token_ids), answer.finish_reason) for answer in answers] == [(4, None)] * 2
    assert answers[0].score > answers[1].score
    assert generator.sequence(1) == [*oracle.random_tokens(5), *answers[1].token_ids]
    assert generator.loop.cache.nbytes <= 3 * 256 * lm.cache_bytes_per_token


def test_settings_reach_hypotheses_of_a_form(build: Any) -> None:
    """Where a form allows fewer tokens than there are beams, every answer still keeps to it."""
    lm = build("llama")
    made = lm.generate("a", guidance=Guidance.choices(["yes", "no"]), num_beams=4, num_return_sequences=2)
    assert {str(made), str(made.alternatives[0])} == {"yes", "no"}
    assert made.finish_reason == "stop"
