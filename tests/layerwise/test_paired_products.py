"""Two models that differ little, multiplied by integers: their difference is that in fp32, nearly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ortlm.checkpoint.hub import find_checkpoint
from ortlm.dtypes import Floats
from ortlm.graph.builder import Product
from ortlm.layerwise.model import LayerwiseModel
from ortlm.spec import Decoder, Experts
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture
from tests.architectures import families


def through(folder: Any, *, integer: bool, bad: bool = False) -> list[tuple[Floats, Floats]]:
    """Return the states of a model with changed weights, and of the float model, after each layer."""
    checkpoint = find_checkpoint(folder, name=None, cache=None, token=None)
    model = LayerwiseModel(Weights(checkpoint, stored_architecture(checkpoint)), threads=1, integer=integer)
    random = np.random.default_rng(0)

    def change(product: Product, inputs: list[Floats], floats: list[Floats] | None, weight: Floats) -> Floats:
        assert floats is not None
        assert len(inputs) == len(floats)
        noise = random.standard_normal(weight.shape).astype(np.float32)
        return weight + np.float32(0.05 * weight.std()) * noise

    rows = [np.random.default_rng(i).integers(5, 90, length) for i, length in enumerate((40, 40, 17))]
    states, others = model.embed(rows), model.embed(rows)
    if bad:
        others[0][0, 3, 2] = np.inf
    found = []
    for index in range(len(model.spec.layers)):
        states, others = model.layer(index, states, change, others)
        found.append(tuple(np.concatenate([x.reshape(-1, x.shape[-1]) for x in s]) for s in (states, others)))
    model.close()
    return found


def spec_of(folder: Any) -> Decoder:
    return stored_architecture(find_checkpoint(folder, name=None, cache=None, token=None)).decoder


def relative(got: Floats, want: Floats) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_near_fp32(name: str, saved: Any) -> None:
    row = saved(name)
    if any(isinstance(layer.ffn, Experts) for layer in spec_of(row.folder).layers):
        pytest.skip("tokens choose other experts after a small change")
    for got, want in zip(through(row.folder, integer=True), through(row.folder, integer=False), strict=True):
        assert relative(got[0], want[0]) < 0.1
        assert relative(got[1] - got[0], want[1] - want[0]) < 0.25


def test_what_is_not_finite_stays_so(saved: Any) -> None:
    states, others = through(saved("llama").folder, integer=True, bad=True)[0]
    assert np.isfinite(states).all()
    assert not np.isfinite(others).all()
