"""What generation_config.json asks of every answer: obeyed as transformers does, or told at build time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ortlm
from ortlm.artifact import open_artifact
from ortlm.artifact.generation_config import GENERATION, not_obeyed
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.errors import BadArtifact, BadCheckpoint
from tests.architectures import families, oracle

PROMPT = oracle.random_tokens(12)
STEPS = 24


def no_empty_rows(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Forbid ids without a token, as the runtime does."""
    scores = scores.clone()
    scores[:, families.tokenizer().get_vocab_size() :] = -torch.inf
    return scores


def generate(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            do_sample=False,
            logits_processor=[no_empty_rows],
        )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def plain(saved: Any) -> list[int]:
    return generate(saved("llama").model)


def keys(tokens: list[int]) -> dict[str, Any]:
    """Return settings, each of which changes what is written after PROMPT if that were ``tokens``."""
    return {
        "suppress_tokens": [tokens[0], tokens[3]],
        "begin_suppress_tokens": [tokens[0]],
        "bad_words_ids": [tokens[1:3], [tokens[5]]],
        "no_repeat_ngram_size": 1,
        "sequence_bias": [[[tokens[0]], -50.0], [[tokens[2], tokens[3]], -60.0], [[7], 1.5]],
        "repetition_penalty": 1.7,
        "min_new_tokens": 10,
        "min_length": len(PROMPT) + 9,
    }


def with_config(saved: Any, folder: Path, values: dict[str, Any]) -> Path:
    shutil.copytree(saved("llama").folder, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "names",
    [[name] for name in keys([0] * STEPS)]
    + [["sequence_bias", "repetition_penalty", "no_repeat_ngram_size"]],
    ids="+".join,
)
def test_every_key_is_obeyed_as_in_transformers(names: list[str], saved: Any, tmp_path: Path) -> None:
    first = plain(saved)
    # Where the shortest length matters, the third token would end the answer.
    ends = [first[2]] if names[0].startswith("min_") else [281]
    values = {name: keys(first)[name] for name in names}
    folder = with_config(saved, tmp_path / "checkpoint", {"eos_token_id": ends, "pad_token_id": 0, **values})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ends[0]}))
    # The tokenizer names ends of its own.
    found = json.loads((folder / "tokenizer_config.json").read_text())
    del found["eos_token"], found["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    want = generate(model)
    ortlm.build(folder, tmp_path / "out", precision="fp32")
    got = list(ortlm.load(tmp_path / "out", threads=1).generate(PROMPT, max_new_tokens=STEPS).token_ids)
    assert got == want
    # Without the keys it would be another answer.
    assert got != (first[:3] if names[0].startswith("min_") else first)


def test_what_a_caller_asks_for_wins(saved: Any, tmp_path: Path) -> None:
    first = plain(saved)
    values = {
        name: keys(first)[name] for name in ("no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")
    }
    folder = with_config(saved, tmp_path / "checkpoint", values)
    ortlm.build(folder, tmp_path / "out", precision="fp32")
    lm = ortlm.load(tmp_path / "out", threads=1)
    asked = {"no_repeat_ngram_size": 0, "suppress_tokens": (), "bad_words": (), "ignore_eos": True}
    assert list(lm.generate(PROMPT, max_new_tokens=STEPS, **asked).token_ids) == first


def test_the_rest_is_told(saved: Any, tmp_path: Path) -> None:
    values = {
        "num_beams": 4,
        "forced_eos_token_id": 2,
        "exponential_decay_length_penalty": [5, 1.1],
        "max_new_tokens": 9,
        "renormalize_logits": True,
        "guidance_scale": 2.0,
        "my_key": 1,
        "transformers_version": "5",
        "use_cache": False,
        "max_length": 20,
        "early_stopping": False,
        "temperature": 0.5,
        "_from_model_config": True,
        "top_h": 0.4,
    }
    told = [
        "exponential_decay_length_penalty",
        "forced_eos_token_id",
        "guidance_scale",
        "max_new_tokens",
        "my_key",
        "num_beams",
        "renormalize_logits",
        "top_h",
    ]
    assert not_obeyed(values) == told
    (note,) = prepare(BuildRequest(with_config(saved, tmp_path / "checkpoint", values))).outline.notes
    assert note.endswith(f"{', '.join(told)}.")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("suppress_tokens", 5),
        ("suppress_tokens", [-1]),
        ("suppress_tokens", ["a"]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[10**9]]),
        ("sequence_bias", {"a": 1}),
        ("sequence_bias", [[5, 1.0]]),
        ("sequence_bias", [[[5], "x"]]),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 1.5),
        ("min_length", True),
        ("min_new_tokens", 10**30),
        ("begin_suppress_tokens", {}),
        ("top_p", 2),
    ],
)
def test_values_that_cannot_be_are_refused(key: str, value: Any, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=key):
        prepare(BuildRequest(with_config(saved, tmp_path / "checkpoint", {key: value})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("suppress_tokens", "x"),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("bad_words_ids", [5]),
        ("do_sample", 1),
    ],
)
def test_an_artifact_is_checked_too(key: str, value: Any, build: Any, tmp_path: Path) -> None:
    shutil.copytree(build("llama").artifact.path, tmp_path / "out")
    path = tmp_path / "out" / "ortlm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "generation": {key: value}}))
    with pytest.raises(BadArtifact, match=rf"generation\.{key}"):
        open_artifact(tmp_path / "out")


def test_table_is_what_settings_know() -> None:
    from ortlm.runtime.sampling.settings import _PRESCRIBED

    assert {name for name, _ in _PRESCRIBED.values()} < set(GENERATION)


def test_ends_of_both_files_count(saved: Any, tmp_path: Path) -> None:
    """transformers stops at those of generation_config.json alone; see docs/architecture.md for the reason."""
    folder = with_config(saved, tmp_path / "checkpoint", {"eos_token_id": [17]})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 19}))
    assert {17, 19} <= set(prepare(BuildRequest(folder)).manifest.stop_token_ids)
