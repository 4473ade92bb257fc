import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ortlm.runtime.sampling.top_k import descending, largest, possible


def same(row, count):
    got = largest(row, count)
    least = np.sort(row)[-count] if count <= len(row) else -np.inf
    assert got.tolist() == np.flatnonzero(row >= least).tolist()


@given(
    st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=90), st.integers(1, 100)
)
def test_largest_of_short_rows(values, count):
    same(np.array(values, np.float32), count)


@pytest.mark.parametrize("count", [1, 2, 50, 900, 1100, 30_000])
@pytest.mark.parametrize("possible_ids", [40, 8192, 32_064])
@pytest.mark.parametrize("equal", [False, True])
def test_largest_of_long_rows(count, possible_ids, equal):
    row = np.random.default_rng(0).normal(size=32_064).astype(np.float32)
    row[possible_ids:] = -np.inf
    same(np.round(row) if equal else row, count)
    # All of the largest in one place, as the ids of digits or of one script.
    same(np.sort(row), count)


def test_descending_is_stable():
    row = np.array([1, 3, 2, 3], np.float32)
    assert descending(row, np.array([0, 1, 3])).tolist() == [1, 3, 0]


def test_possible_skips_rows_that_are_nearly_full():
    row = np.zeros(100, np.float32)
    row[3] = -np.inf
    assert possible(row)[0] is None
    row[5:] = -np.inf
    ids, kept = possible(row)
    assert ids.tolist() == [0, 1, 2, 4]
    assert len(kept) == 4
