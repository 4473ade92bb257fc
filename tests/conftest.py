"""Shared set-up: one thread each, because the tests run side by side, and no network."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Where builds note what they were made from.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ortlm-tests-")

import pytest
import torch

import ortlm
from ortlm import presets
from ortlm.options import BuildOptions
from tests.architectures import families

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
torch.set_num_threads(1)

# Most tests are about other things than calibration, which would take most of their time.
presets.DEFAULTS["int4"] = "fast"

ROOT = Path(__file__).parents[1]


class Saved:
    """A tiny checkpoint on disk and the transformers model that it was saved from."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.model: Any = families.save(name, folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a function from a family row to its checkpoint; each is made once."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            made[name] = Saved(name, tmp_path_factory.mktemp("checkpoint") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def build(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ortlm.LanguageModel]:
    """Return a function that builds a family row once per precision and options, and loads it."""
    made: dict[tuple[Any, ...], ortlm.LanguageModel] = {}

    def get(name: str, precision: str = "fp32", options: BuildOptions | None = None) -> ortlm.LanguageModel:
        key = (name, precision, options)
        if key not in made:
            out = tmp_path_factory.mktemp("built") / f"{name}-{precision}"
            ortlm.build(saved(name).folder, out, precision=precision, options=options)
            made[key] = ortlm.load(out, threads=1)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Return the folder of the small trained model that ships with the project."""
    return ROOT / "models" / "tiny-phi3"
