"""Second moments by integer matmul are those in fp32, nearly, whatever the inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ortlm.calibration.integer_moments import IntegerMoments
from ortlm.errors import BadCheckpoint
from ortlm.quant.gptq import moments


@pytest.fixture
def integer() -> Iterator[IntegerMoments]:
    made = IntegerMoments(threads=2)
    yield made
    made.close()


def inputs(lengths: list[int], width: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((width, width)) * np.geomspace(0.01, 10, width)
    found = []
    for length in lengths:
        x = random.standard_normal((2, length, width)) @ mixed
        x[0, 0, ::7] *= 300  # the first tokens of a text have channels that stand out
        found.append(x.astype(np.float32))
    return found


@pytest.mark.parametrize("lengths", [[512] * 9, [3000, 17, 1, 5100]])
def test_near_those_in_fp32(lengths: list[int], integer: IntegerMoments) -> None:
    x = inputs(lengths, 96)
    x[-1][..., 5] = 0
    random = np.random.default_rng(1)
    f = [(1.05 * a + 0.1 * random.standard_normal(a.shape)).astype(np.float32) for a in x]
    want, found = moments(x, f), integer(x, f)
    size = np.sqrt(np.maximum(np.diagonal(want.second), 1e-12))
    assert np.abs(np.diagonal(found.second) - np.diagonal(want.second)).max() <= 1e-4 * want.second.max()
    assert np.abs((found.second - want.second) / np.outer(size, size)).max() < 0.03
    assert (found.second == found.second.T).all()
    assert want.drift is not None
    assert found.drift is not None
    assert np.linalg.norm(found.drift - want.drift) < 0.02 * np.linalg.norm(want.drift)
    assert integer(x).drift is None


def test_few_tokens_are_summed_in_fp32(integer: IntegerMoments) -> None:
    x = inputs([100], 32)
    assert (integer(x).second == moments(x).second).all()


def test_any_number_of_threads_gives_the_same(integer: IntegerMoments) -> None:
    x = inputs([2048, 2048], 64)
    other = IntegerMoments(threads=1)
    assert (other(x, x[::-1]).drift == integer(x, x[::-1]).drift).all()
    other.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value: float, integer: IntegerMoments) -> None:
    x = inputs([4096], 32)
    x[0][0, 7, 3] = value
    with pytest.raises(BadCheckpoint, match="NaN or infinite"):
        integer(x)
