"""A model in fp32, layer after layer, against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ortlm.checkpoint.hub import find_checkpoint
from ortlm.layerwise.model import LayerwiseModel, batches
from ortlm.layerwise.reference import open_reference
from ortlm.quant.rotation import Rotation
from ortlm.weights.reader import Weights, check_rotatable
from ortlm.weights.resolution import stored_architecture, untied
from tests.architectures import families, oracle

NAMES = sorted(families.FAMILIES)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 90, length)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name: str, saved: Any) -> None:
    row = saved(name)
    reference = open_reference(row.folder, threads=1)
    chunks = [prompt(40), prompt(17, 1)]
    reference.open(chunks)
    for i, chunk in enumerate(chunks):
        want = oracle.prompt_logits(row.model, chunk.tolist())
        got = reference.logits(i)
        assert np.abs(got - want).max() / np.abs(want).max() < 1e-4
    reference.close()


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3", "granite"])
def test_a_rotated_model_computes_the_same(name: str, saved: Any) -> None:
    row = saved(name)
    checkpoint = find_checkpoint(row.folder, name=None, cache=None, token=None)
    architecture = stored_architecture(checkpoint)
    if architecture.decoder.tied_head:
        architecture = untied(architecture, architecture.sources["embed.weight"])
    check_rotatable(architecture.decoder)
    rotation = Rotation(architecture.decoder.hidden)
    model = LayerwiseModel(Weights(checkpoint, architecture, rotation=rotation), threads=1)
    states = model.embed([prompt(24)])
    for index in range(len(architecture.decoder.layers)):
        states, _ = model.layer(index, states)
    got, want = model.logits(states[0])[0], oracle.prompt_logits(row.model, prompt(24).tolist())
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-4
    model.close()


@pytest.mark.parametrize("size", [1, 8, 24, 96])
def test_rotation_is_orthogonal(size: int) -> None:
    q = Rotation(size, seed=3).rows(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-5)
    np.testing.assert_allclose(Rotation(size, seed=3).outputs(np.eye(size, dtype=np.float32)), q.T, atol=1e-6)


def test_batches_keep_the_order() -> None:
    rows = [prompt(n, i) for i, n in enumerate((5, 5, 7, 5))]
    assert [b.shape for b in batches(rows)] == [(2, 5), (1, 7), (1, 5)]
    assert np.array_equal(np.concatenate([b.ravel() for b in batches(rows)]), np.concatenate(rows))
