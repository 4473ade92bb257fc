"""Trained models in GGUF, against transformers' own reading of the same files, and against llama.cpp.

``make test-real`` downloads them; elsewhere these tests are left out. ``record.py`` made ``llama_cpp.json``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.checkpoint.gguf import open_gguf
from ortlm.runtime.language_model import LanguageModel
from tests.architectures import oracle
from tests.real.models import MODELS, fetch

HERE = Path(__file__).parent
FOLDER = os.environ.get("REAL_MODELS")
TEXTS = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
# Tokens whose logits are nearer than this may change places with the order in which fp32 adds.
TIE = 0.01

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(FOLDER is None, reason="make test-real downloads the models"),
]


class Real:
    """A model's file, what it is as fp32, and what llama.cpp says."""

    def __init__(self, name: str, folder: Path) -> None:
        self.path = fetch(Path(FOLDER or ""), name)
        self.license = MODELS[name].license
        self.fp32: Path = ortlm.build(self.path, folder / "fp32", precision="fp32").path
        found = json.loads((HERE / "llama_cpp.json").read_text(encoding="utf-8"))
        self.llama: dict[str, Any] = found[self.path.name]


@pytest.fixture(scope="module", params=MODELS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    return Real(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def lm(real: Real) -> LanguageModel:
    return ortlm.load(real.fp32)


def check_most_likely(lm: LanguageModel, ids: list[int], new: list[int], where: str) -> None:
    """Check that ``new`` are the most likely tokens after ``ids``, one after the other; a tie is told."""
    logits = np.asarray(lm.logits([*ids, *new]))[len(ids) - 1 : -1]
    for at, (row, token) in enumerate(zip(logits, new, strict=True)):
        behind = float(row.max() - row[token])
        assert behind < TIE, f"{where}: token {at} is {int(row.argmax())}, not {token}, by {behind:.4f}"
        if behind:
            print(f"{where}: a tie at token {at}, by {behind:.4f}")


def test_logits_are_those_of_transformers(real: Real, lm: LanguageModel) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(real.path.parent), gguf_file=real.path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    for prompt in TEXTS["prompts"]:
        ids = list(lm.tokenizer.encode(prompt))
        with torch.no_grad():
            logits = np.asarray(model(torch.tensor([ids])).logits[0])
        assert oracle.relative_error(np.asarray(lm.logits(ids)), logits) < 1e-4
        check_most_likely(lm, ids, oracle.greedy(model, ids, steps=64), repr(prompt))


def test_tokens_are_those_of_llama_cpp(real: Real, lm: LanguageModel) -> None:
    for found in real.llama["written"]:
        ids = list(lm.tokenizer.encode(found["prompt"]))
        assert ids == found["ids"]
        assert len(found["new"]) == 64
        check_most_likely(lm, ids, found["new"], repr(found["prompt"]))


def test_ids_are_those_of_llama_cpp(real: Real, lm: LanguageModel) -> None:
    assert len(TEXTS["hard"]) > 100
    for text, ids in zip(TEXTS["hard"], real.llama["ids"], strict=True):
        assert list(lm.tokenizer.encode(text)) == ids, repr(text)


def test_an_int4_build_writes_sense(real: Real, tmp_path: Path) -> None:
    options = BuildOptions(recipe="fast", keep_quantization=True)
    artifact = ortlm.build(real.path, tmp_path / "int4", options=options)
    said = ortlm.load(artifact.path).generate("The sun rises in the", max_new_tokens=24, temperature=0.0).text
    assert len(set(said.split())) > 5
    card = (artifact.path / "README.md").read_text(encoding="utf-8")
    assert f"license: {real.license}\n" in card
    assert f"The base model's license applies: {real.license}." in card


def test_parts_of_a_row_are_read_alone(real: Real) -> None:
    """Of the largest matrix only what is asked for is in memory."""
    weight = open_gguf(real.path).weights["model.embed_tokens.weight"]
    assert weight.rows(5, 9).shape == (4, weight.shape[1])
