"""The oracle itself: its ways to the same logits agree, and its models are no degenerate ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.architectures import families, oracle


@pytest.mark.parametrize("name", families.FAMILIES)
def test_decode_agrees_with_prompt_and_models_are_not_degenerate(name: str, tmp_path: Path) -> None:
    model = families.save(name, tmp_path)
    tokens = oracle.random_tokens(40)
    logits = oracle.prompt_logits(model, tokens)
    assert logits.shape == (40, families.VOCAB)
    assert 1.5 < logits.std() < 6.0
    assert oracle.relative_error(oracle.decode_logits(model, tokens, prompt=5), logits) < 1e-5
    # The order of earlier tokens matters: rotation, window and cache are visible in the result.
    swapped = [*tokens[:35], tokens[36], tokens[35], *tokens[37:]]
    assert oracle.relative_error(oracle.prompt_logits(model, swapped)[-1], logits[-1]) > 1e-3
    assert len(set(oracle.greedy(model, tokens[:20], steps=64))) > 5


@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-longrope-old", "phi4-mini"])
def test_greedy_crosses_the_longrope_switch(name: str, tmp_path: Path) -> None:
    model = families.save(name, tmp_path)
    assert oracle.switch_tokens(model.config) == 64
    prompt = oracle.random_tokens(50)
    new = oracle.greedy(model, prompt, steps=40)
    logits = oracle.decode_logits(model, prompt + new, prompt=50)
    assert np.argmax(logits[49:-1], axis=-1).tolist() == new
    # Beyond the switch every position is rotated by the long table.
    at_once = oracle.prompt_logits(model, prompt + new)
    assert oracle.relative_error(logits[64:], at_once[64:]) < 1e-5
    assert oracle.relative_error(logits[:64], at_once[:64]) > 1e-2


def test_tokenizer_covers_all_bytes_and_fits_the_vocabulary(tmp_path: Path) -> None:
    families.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 273 <= families.VOCAB
    text = "the ringer, naïve 日本 🙂"
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<s>") == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|user|>hi<|end|>", add_special_tokens=False).ids[::3] == [4, 6]
