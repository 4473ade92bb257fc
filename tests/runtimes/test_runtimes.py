"""A folder gives the same greedy tokens in every runtime that it is made for.

Runs in environments of their own, which takes packages from the network, so it is left out unless asked for:

    make test-runtimes                    all that can be had on this machine
    make test-runtimes RUNTIMES=ends      the lowest and the highest ONNX Runtime; fails without one of them
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import pytest

from tests.runtimes.environments import (
    NEWEST,
    RUNTIMES,
    Runtime,
    Unavailable,
    apart,
    ask,
    chosen,
    prepare,
)
from tests.runtimes.models import MODELS, Model, make_cases

WANTED = os.environ.get("RUNTIMES", "")
pytestmark = [
    pytest.mark.skipif(
        not WANTED, reason="runtimes of other versions have tests of their own: make test-runtimes"
    ),
    pytest.mark.skipif(
        sys.version_info < (3, 11), reason="Python 3.10 gets one ONNX Runtime, 1.23, which make test runs"
    ),
]
CHOSEN = [runtime for runtime in RUNTIMES if chosen(runtime, WANTED)]
if WANTED and not CHOSEN:
    raise pytest.UsageError(
        f"RUNTIMES={WANTED} names no runtime. It is all, ends, or a part of a name, for example 1.27: "
        + "; ".join(runtime.name for runtime in RUNTIMES)
    )
# How far logits may be apart, relative to the largest: sums in another order, or activations rounded to 8 bits by
# other kernels. Random weights of tiny models make most of that.
EXACT, ROUNDED, HALF = 1e-4, 0.15, 5e-3
# The CPU provider has no kernels for bf16.
SHOWN = [model for model in MODELS if model.precision != "bf16"]
NAMES = [model.name for model in SHOWN]
# A shipped default folder gives the same tokens everywhere, near ties of activations in 8 bits or not.
DEFAULTS = ("cpu int4", "cpu fp32", "mobile int4")


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that asks a runtime everything, once."""
    cases = make_cases(SHOWN, tmp_path_factory.mktemp("runtimes"))

    @cache
    def get(runtime: Runtime) -> dict[str, Any]:
        try:
            prepare(runtime)
        except Unavailable as error:
            return {"unavailable": str(error)}
        found: dict[str, Any] = ask(runtime, cases)["cases"]
        return found

    def checked(runtime: Runtime) -> dict[str, Any]:
        found = get(runtime)
        if "unavailable" in found:
            # Continuous integration asks for the ends: without them it has proven nothing.
            (pytest.fail if WANTED == "ends" else pytest.skip)(found["unavailable"])
        return found

    return checked


def tolerance(model: Model) -> float:
    return EXACT if model.exact else HALF if model.precision == "fp16" else ROUNDED


def compare(model: Model, got: dict[str, Any], want: dict[str, Any]) -> None:
    """Check one answer against that of the newest ONNX Runtime."""
    assert "error" not in got, got
    assert apart(got["logits"], want["logits"]) < tolerance(model)
    if model.exact or model.name in DEFAULTS:
        assert got["tokens"] == want["tokens"]
    assert got.get("ragged", 0.0) < tolerance(model)


@pytest.mark.parametrize("model", SHOWN, ids=NAMES)
@pytest.mark.parametrize("runtime", CHOSEN, ids=lambda r: r.name)
def test_runtime(runtime: Runtime, model: Model, answers: Any) -> None:
    """Each graph loads where it should, and says what the newest ONNX Runtime says."""
    got, want = answers(runtime)[model.name], answers(NEWEST)[model.name]["ortlm"]
    if "ortlm" in got:
        if runtime.onnxruntime < model.needs:
            assert f"needs ONNX Runtime {model.needs[0]}.{model.needs[1]} or later" in got["ortlm"]["error"]
            return
        lengths = runtime.onnxruntime >= (1, 32) and model.target in ("cpu", "cuda")
        assert got["ortlm"]["graph"] == ("model_ragged.onnx" if lengths else "model.onnx")
        compare(model, got["ortlm"], want)
    if "tokens" in got or "error" in got:
        compare(model, got, want)


def test_something_was_compared(answers: Any) -> None:
    """Random weights of a few families say one token over and over; their logits are compared all the same."""
    dull = [name for name, answer in answers(NEWEST).items() if len(set(answer["ortlm"]["tokens"])) <= 2]
    assert len(dull) <= len(NAMES) // 20, dull
    assert not {model.name for model in SHOWN if model.source == "shipped"}.intersection(dull)
