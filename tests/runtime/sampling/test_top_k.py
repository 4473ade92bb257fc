import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ortlm.runtime.sampling.top_k import descending, largest, largest_each, possible


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


@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize("decimals", [7, 2, 0])
def test_largest_of_every_row_at_once(count, decimals):
    logits = np.random.default_rng(count).normal(size=(5, 4_003)).astype(np.float32).round(decimals)
    found, wanted = largest_each(logits, count), [largest(row, count) for row in logits]
    if found is None:
        # By equal values.
        assert len({len(ids) for ids in wanted}) > 1
    else:
        assert found.tolist() == [ids.tolist() for ids in wanted]


def test_rows_that_are_not_looked_at_at_once():
    logits = np.zeros((2, 4_003), np.float32)
    assert largest_each(logits[:, :100], 50) is None
    logits[1, 3:] = -np.inf
    assert largest_each(logits, 5) is None


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
