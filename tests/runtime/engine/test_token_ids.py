"""Arithmetic of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN, common_prefix_length


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [
        ([], [], 0),
        ([], [1], 0),
        ([1], [2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], (1, 2), 2),
        ([1, 2, 3], [1, 5, 3], 1),
        # Such ids are beyond what a float64 tells apart.
        ([FIRST_IMAGE_TOKEN, FIRST_IMAGE_TOKEN + 1], [FIRST_IMAGE_TOKEN, FIRST_IMAGE_TOKEN + 2], 1),
    ],
)
def test_common_prefix(left: Sequence[int], right: Sequence[int], length: int) -> None:
    assert common_prefix_length(left, right) == common_prefix_length(right, left) == length
