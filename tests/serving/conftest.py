"""The small trained model of the project, built once, and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

import ortlm
from ortlm.builder.options import BuildOptions


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the small trained model in int4, which gives hidden states too."""
    out = tmp_path_factory.mktemp("trained") / "tiny"
    ortlm.build(tiny, out, precision="int4", options=BuildOptions(hidden_states=True))
    return out


@pytest.fixture(scope="session")
def lm(trained: Path) -> ortlm.LanguageModel:
    """Return that model, loaded."""
    return ortlm.load(trained, threads=1)


@pytest.fixture(scope="session")
def wide_blocks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ortlm.LanguageModel:
    """Return it with blocks of 128 weights, loaded."""
    out = tmp_path_factory.mktemp("wide") / "tiny"
    options = BuildOptions(recipe="fast", block_size=128)
    ortlm.build(tiny, out, precision="int4", options=options)
    return ortlm.load(out, threads=1)
