"""transformers.js and onnxruntime-web run what ``--layout transformers.js`` builds, and choose the same tokens.

Takes packages from npm, so it is left out unless asked for:

    make test-browser                  in node and in Chromium, where there are
    make test-browser BROWSER=node     in node only
    make test-browser BROWSER=quick    in node, most families once, and one graph in Chromium (WebAssembly, WebGPU)
    make test-browser BROWSER=page     the chat page only: test_chat_page.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.builder.transformers_js import DTYPES, LAYOUT, TYPES
from tests.architectures import families, oracle
from tests.browser.environment import MOST_TOKENS, PLACES, TEXTS, Case, Place, Reference, ask, make_case
from tests.runtimes.environments import Unavailable, apart

WANTED = os.environ.get("BROWSER", "")
pytestmark = pytest.mark.skipif(not WANTED, reason="browsers have tests of their own: make test-browser")
STEPS = 32
# Activations stay float, as WebAssembly has them: what differs is the order of sums.
OPTIONS = BuildOptions(recipe="fast", accuracy_level=1)
# How far logits may be apart, relative to the largest.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3}
# What Chromium runs in the quick way.
QUICK = ("transformers.js", "q4")


def wanted(place: Place) -> bool:
    """Return whether something is asked of ``place``."""
    return WANTED in ("all", "quick", place.driver)


ASKED = [
    (library, place, dtype)
    for place in PLACES
    if wanted(place)
    for library in ("transformers.js", "onnxruntime-web")
    # onnxruntime-web has no device "cpu", and in node transformers.js has no other.
    if place.driver == "chromium" or (library == "transformers.js") == (place.device == "cpu")
    for dtype in DTYPES
    if place.fp16 or DTYPES[dtype].activations != "fp16"
    if WANTED != "quick" or place.driver == "node" or (library, dtype) == QUICK
]
# Where all families run.
SEVERAL = [place for place in PLACES if wanted(place) and (WANTED != "quick" or place.name == "node cpu")]


# Gemma 2 caps scores, which WebGPU's attention ignores; mixtures of experts and states of one size are refused.
REFUSED = {"gemma2", *families.MIXTURES, *families.RECURRENT}
# Nor does transformers.js know all types of models.
FAMILIES = [
    name
    for name, config in families.FAMILIES.items()
    if not name.endswith("-old") and name not in REFUSED and config().model_type in TYPES
]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the model ``tiny``, the shipped one in every dtype."""
    place = tmp_path_factory.mktemp("models")
    ortlm.build(tiny, place / "tiny", layout=LAYOUT, precision=",".join(DTYPES), options=OPTIONS)
    return place


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = ortlm.load(folder / "tiny").tokenizer
    found = [tokenizer.encode(text) for text in TEXTS]
    assert max(map(len, found)) <= MOST_TOKENS
    return found


@pytest.fixture(scope="module")
def answers(folder: Path, prompts: list[list[int]]) -> Any:
    """Return a function that asks a driver everything, once."""

    @cache
    def get(driver: str) -> dict[str, Any]:
        cases = [case_of(folder, prompts, *one) for one in ASKED if one[1].driver == driver]
        return ask(driver, folder, cases)

    def checked(driver: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = get(driver)
        except Unavailable as error:
            pytest.skip(str(error))
        return found

    return checked


def case_of(folder: Path, prompts: list[list[int]], library: str, place: Place, dtype: str) -> Case:
    return make_case(folder / "tiny", library, place, dtype, prompts, STEPS)


@pytest.mark.parametrize(("library", "place", "dtype"), ASKED, ids=lambda x: getattr(x, "name", x))
def test_same_tokens(
    library: str, place: Place, dtype: str, folder: Path, prompts: list[list[int]], answers: Any
) -> None:
    """Greedy tokens are the processor's, but for near ties; alone, in a batch, and as text; nothing is logged."""
    case = case_of(folder, prompts, library, place, dtype)
    found = answers(place.driver)[case.name]
    assert "error" not in found, found["error"]
    assert found.get("logged", []) == []
    tolerance = TOLERANCE[DTYPES[dtype].activations]
    reference = Reference(folder / "tiny" / "onnx" / case.graph)
    for prompt, tokens in zip(prompts, found["alone"], strict=False):
        assert len(tokens) == STEPS
        assert max(reference.gaps(prompt, tokens)) <= tolerance
    if library == "onnxruntime-web":
        assert apart(found["logits"], reference.logits(prompts[0])[-1].tolist()) <= tolerance
        return
    assert found["loaded"] == f"{place.device} {dtype}"
    assert found["scored"] <= tolerance
    for prompt, tokens in zip(prompts, found["batch"], strict=True):
        assert len(tokens) == case.batchSteps
        assert max(reference.gaps(prompt, tokens)) <= tolerance
    # The pipeline's own way: text in, text out.
    tokenizer = ortlm.load(folder / "tiny").tokenizer
    stops = ortlm.load(folder / "tiny").manifest.stop_token_ids
    for text, prompt, answer in zip(TEXTS, prompts, found["texts"], strict=True):
        written = tokenizer.encode(answer, add_special_tokens=False)[: len(prompt) + case.batchSteps]
        assert answer.startswith(text)
        fresh = written[len(prompt) :]
        assert fresh
        assert max(reference.gaps(prompt, fresh)) <= tolerance
    assert found["reply"]
    assert not any(stop in tokenizer.encode(found["reply"], add_special_tokens=False) for stop in stops)


@pytest.mark.parametrize("place", SEVERAL, ids=lambda p: p.name)
def test_families(place: Place, saved: Any, tmp_path: Path) -> None:
    """Each family's settings are understood, and its graph chooses the processor's tokens."""
    library = "onnxruntime-web" if place.name == "node wasm" else "transformers.js"
    prompts = [oracle.random_tokens(count, seed=count) for count in (30, 11, 19)]
    cases = []
    for name in FAMILIES:
        ortlm.build(saved(name).folder, tmp_path / name, layout=LAYOUT, precision="fp32")
        cases.append(make_case(tmp_path / name, library, replace(place, rows=1), "fp32", prompts, 4))
    try:
        answers = ask(place.driver, tmp_path, cases)
    except Unavailable as error:
        pytest.skip(str(error))
    errors = {case.model: answers[case.name]["error"] for case in cases if "error" in answers[case.name]}
    assert not errors, errors
    for name, case in zip(FAMILIES, cases, strict=True):
        found = answers[case.name]
        assert found.get("logged", []) == [], name
        reference = Reference(tmp_path / name / "onnx" / "model.onnx")
        rows = list(zip(prompts, found.get("batch", []), strict=False))
        for prompt, tokens in [(prompts[0], found["alone"][0]), *rows]:
            assert max(reference.gaps(prompt, tokens)) <= TOLERANCE["fp32"], name
        assert found.get("scored", 0) <= TOLERANCE["fp32"], name
