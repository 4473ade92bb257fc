"""A few of the moments of ``make test-kill``."""

from __future__ import annotations

import pytest

from tests.builder.kill_builds import run


@pytest.mark.slow
def test_a_killed_build_leaves_the_old_artifact_or_the_new_one() -> None:
    run(2, 7, ("plain",), tell=False)
