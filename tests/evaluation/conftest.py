"""Two builds of the small model that ships with the project, and sources in numpy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ortlm


@pytest.fixture(scope="session")
def builds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a precision to the folder of a build, which tests leave as it is."""
    made: dict[str, Path] = {}

    def get(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("evaluation") / precision
            ortlm.build(tiny, made[precision], precision=precision)
        return made[precision]

    return get


@pytest.fixture
def own(builds: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of the int4 build that a test may change."""
    return Path(shutil.copytree(builds("int4"), tmp_path / "own"))
