"""A small built artifact, and copies of it that somebody has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ortlm


@pytest.fixture(scope="session")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the model that ships with the project."""
    out = tmp_path_factory.mktemp("artifact") / "tiny"
    ortlm.build(tiny, out)
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """Return a copy of it."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


@pytest.fixture
def changed(copy: Path) -> Callable[..., Path]:
    """Return a function that sets keys (a/b/0) in a file of the copy; of genai's, without ortlm.json."""

    def change(file: str, values: dict[str, Any]) -> Path:
        found = json.loads((copy / file).read_text())
        for place, value in values.items():
            *keys, last = place.split("/")
            at = found
            for key in keys:
                at = at[int(key)] if isinstance(at, list) else at[key]
            at[last] = value
        (copy / file).write_text(json.dumps(found))
        if file == "genai_config.json":
            (copy / "ortlm.json").unlink()
        return copy

    return change
