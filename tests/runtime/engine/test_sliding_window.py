"""Caches of windows against transformers: windows in all layers, in some, with soft caps, and whatever is fed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from ortlm.artifact import from_genai
from ortlm.builder.extra_options import parse_extra_options
from ortlm.builder.options import BuildOptions
from ortlm.cli import main
from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.engine import sliding_window_cache as window
from ortlm.target import TARGETS
from tests import official
from tests.architectures import oracle
from tests.graph.test_parity import PROMPT, STEPS, TOLERANCE, greedy

FAMILIES = ["phi3-window", "mistral", "gemma2", "gemma3"]
OPTIONS = BuildOptions(window_cache=True)

Saved = Any
Build = Callable[..., ortlm.LanguageModel]


@pytest.fixture(autouse=True)
def small_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests' windows of 8 evict every few tokens."""
    monkeypatch.setattr(window, "_SLACK", 5)
    monkeypatch.setattr(window, "_KEPT", 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_decode(name: str, saved: Saved, build: Build) -> None:
    model, lm = saved(name).model, build(name, "fp32", OPTIONS)
    tokens = oracle.random_tokens(120)
    want = oracle.prompt_logits(model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < TOLERANCE
    got = lm.logits_batch([tokens[:PROMPT]], [tokens[PROMPT:]])[0]
    assert oracle.relative_error(got, want[PROMPT - 1 :]) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_different_lengths(name: str, saved: Saved, build: Build) -> None:
    """Behind different pasts, in chunks shorter than some parts and longer than others."""
    model, lm = saved(name).model, build(name, "fp32", OPTIONS)
    parts = [(9, 3, 25), (40, 1, 2), (1, 50, 1)]
    rows = [oracle.random_tokens(sum(part[i] for part in parts), seed=i) for i in range(3)]
    loop = lm.loop()
    loop._chunk = 4
    loop.start(3)
    at = np.zeros(3, int)
    for part in parts:
        got = loop.append([row[a : a + n] for row, a, n in zip(rows, at, part, strict=True)])
        at += part
        for i, row in enumerate(rows):
            assert oracle.relative_error(got[i], oracle.prompt_logits(model, row[: at[i]])[-1]) < TOLERANCE
    assert loop.recomputed == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_official_runtime(name: str, saved: Saved, build: Build) -> None:
    lm = build(name, "fp32", OPTIONS)
    prompt = oracle.random_tokens(PROMPT)
    want = oracle.greedy(saved(name).model, prompt, steps=STEPS)
    assert greedy(lm, prompt, steps=STEPS) == want
    ends = [i for i, token in enumerate(want) if token in (2, 6)]
    steps = ends[0] if ends else STEPS
    assert official.greedy(lm.artifact.path, prompt, steps=steps) == want[:steps]


def test_the_official_description_is_enough(build: Build, tmp_path: Path) -> None:
    """Without ``ortlm.json``, ``genai_config.json`` says which layers have a window."""
    lm = build("gemma3", "fp32", OPTIONS)
    for path in lm.artifact.path.iterdir():
        if path.name != "ortlm.json":
            shutil.copy(path, tmp_path)
    other = ortlm.load(tmp_path, threads=1)
    states = {state.past: state for state in other.manifest.graphs["decoder"].states}
    ours = {state.past: state for state in lm.manifest.graphs["decoder"].states}
    assert {past: state.window for past, state in states.items()} == {p: s.window for p, s in ours.items()}
    prompt = oracle.random_tokens(60)
    assert oracle.relative_error(other.logits(prompt), lm.logits(prompt)) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "evicts"),
    [
        ({}, True),
        ({"cache_slack": None}, False),
        ({"slide_key_value_cache": True}, False),
        ({"layers": []}, False),
    ],
    ids=["0.18", "older", "slides", "no-layers"],
)
@pytest.mark.parametrize("provider", [None, "cuda", "NvTensorRtRtx"])
def test_which_graphs_evict(change: dict[str, Any], evicts: bool, provider: str | None, build: Build) -> None:
    path = build("gemma3", "fp32", OPTIONS).artifact.path / "genai_config.json"
    config = json.loads(path.read_text())
    decoder = config["model"]["decoder"]
    found = decoder["sliding_window"] | change
    decoder["sliding_window"] = {key: value for key, value in found.items() if value is not None}
    decoder["session_options"]["provider_options"] = [{provider: {}}] if provider else []
    kinds = [state.kind for state in from_genai(config, path).graphs["decoder"].states]
    some = evicts and provider != "NvTensorRtRtx"
    assert kinds[:4] == (["window", "window", "grow", "window"] if some else ["grow"] * 4)


def test_a_graph_that_does_not_evict(build: Build, tmp_path: Path) -> None:
    """A description that is wrong is an error, not a wrong answer."""
    text = (build("mistral", "fp32", OPTIONS).artifact.path / "ortlm.json").read_text()
    for path in build("mistral").artifact.path.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "ortlm.json").write_text(text)
    with pytest.raises(BadArtifact, match="could not run"):
        ortlm.load(tmp_path, threads=1).logits(oracle.random_tokens(40))


@pytest.mark.parametrize(
    "options",
    [{"draft": "lookup"}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=str,
)
def test_generation_is_that_of_the_full_cache(options: dict[str, Any], build: Build) -> None:
    prompt = [*oracle.random_tokens(12), *oracle.random_tokens(12)]
    answers = []
    for choice in (None, OPTIONS):
        lm = build("gemma3", "fp32", choice)
        found = lm.generate_batch([prompt, prompt[:5]], max_new_tokens=60, ignore_eos=True, seed=3, **options)
        answers.append([answer.token_ids for answer in found])
    assert answers[0] == answers[1]


def test_the_memory_is_bounded(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    full, less = (build("mistral", "fp32", options).loop() for options in (None, OPTIONS))
    for loop in (full, less):
        loop.start()
        loop.append([oracle.random_tokens(500)])
    assert less.cache.nbytes * 500 < full.cache.nbytes * (8 + 5 + 1)
    assert main(["inspect", str(build("mistral", "fp32", OPTIONS).artifact.path)]) == 0
    assert "4 of 4 tensors keep little more than the last 8 tokens" in capsys.readouterr().out


def test_options(saved: Saved, tmp_path: Path) -> None:
    assert parse_extra_options(["windowed_kv_cache=true"], target=TARGETS["cpu"]).window_cache
    with pytest.raises(BadOption, match=r"windowed_kv_cache does not apply: .* the model has none"):
        ortlm.build(saved("phi3").folder, tmp_path / "out", options=OPTIONS)
    with pytest.raises(BadOption, match="attention on webgpu keeps all positions"):
        ortlm.build(saved("mistral").folder, tmp_path / "out", target="webgpu", options=OPTIONS)
