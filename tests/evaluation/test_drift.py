"""Answers of two models to the prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ortlm.evaluation.drift import ANSWER_TOKENS, drift, repetition, summarize
from ortlm.evaluation.prompts import PROMPTS, in_script, is_refusal
from ortlm.evaluation.sources import ArtifactSource


def test_reference_answers_are_its_own(builds: Callable[[str], Path]) -> None:
    """What is pieced together from drafts is what the reference generates by itself."""
    model, base = ArtifactSource(builds("int8"), 1), ArtifactSource(builds("fp32"), 1)
    answers = drift(model.lm, model, base)
    assert len(answers) == len(PROMPTS)
    whole = 0
    for answer in answers:
        prompt = base.lm.encode([{"role": "user", "content": answer.prompt.text}])
        made = base.lm.generate(prompt, max_new_tokens=ANSWER_TOKENS, reuse_cache=False).token_ids
        assert answer.base_tokens == list(made[: len(answer.base_tokens)])
        whole += answer.base_tokens == list(made)
        assert answer.base_tokens == list(made) or not answer.complete
        assert (answer.tokens == list(made)) == (answer.diverged is None)
        at = len(made) if answer.diverged is None else answer.diverged
        assert answer.tokens[:at] == list(made[:at])
    assert whole > len(answers) // 2


def test_a_model_does_not_drift_from_itself(builds: Callable[[str], Path]) -> None:
    source = ArtifactSource(builds("fp32"), 1)
    found = summarize(drift(source.lm, source, source), source.lm)
    everything = found["all"]
    assert everything["same_answer"] == everything["prompts"] == len(PROMPTS)
    for name in ("agreement", "self_agreement", "same_prefix_share"):
        assert everything[name] == 1
    assert everything["opening_ln_ratio"] == pytest.approx(0, abs=1e-5)
    assert everything["repetition"] == everything["base_repetition"]
    for category in found["categories"].values():
        for counts in (category["refusal"], category.get("valid", {}), category.get("language", {})):
            assert counts.get("model_only", 0) == counts.get("base_only", 0) == 0
    assert "no certificate" in found["about"]
    assert set(found["categories"]) >= {"refusal", "format", "repetition", "language"}


@pytest.mark.parametrize(
    ("number", "answer", "valid"),
    [
        (0, '{"city": "Paris", "country": "France"}', True),
        (0, '```json\n{"city": "Paris", "country": "France"}\n```', True),
        (0, 'Sure! {"city": "Paris", "country": "France"}', False),
        (0, '{"city": "Paris"}', False),
        (2, "1. red\n2. blue\n3. green", True),
        (2, "Here are three:\n1. red\n2. blue\n3. green", False),
        (3, "Yes.", True),
        (3, "Yes, it is.", False),
        (4, "144", True),
        (5, "MARS, VENUS, EARTH", True),
    ],
)
def test_forms(number: int, answer: str, valid: bool) -> None:
    check = [prompt.valid for prompt in PROMPTS if prompt.category == "format"][number]
    assert check is not None
    assert check(answer) is valid


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this.", True),
        ("Sorry, but no.", True),
        ("Sure! First, take a pick.", False),
        ("A neighbour told me that I can open it.", False),
    ],
)
def test_refusals(answer: str, refused: bool) -> None:
    assert is_refusal(answer) is refused


@pytest.mark.parametrize(
    ("answer", "script", "kept"),
    [
        ("Потому что земля наклонена (tilt).", "CYRILLIC", True),
        ("Because the earth is tilted.", "CYRILLIC", False),
        ("朝ごはんを作ります。", "CJK|HIRAGANA|KATAKANA", True),
        ("因为水蒸气", "CJK", True),
        ("123", "LATIN", False),
    ],
)
def test_scripts(answer: str, script: str, kept: bool) -> None:
    assert in_script(answer, script) is kept


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(20))) == 0
    assert repetition([1, 2] * 10) == pytest.approx(1 - 2 / 17)
