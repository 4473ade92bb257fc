"""The small model that ships with the project, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortlm.cli import main


@pytest.fixture(scope="session")
def phi(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an int4 build that gives hidden states too."""
    out = tmp_path_factory.mktemp("cli") / "phi"
    options = ["--extra_options", "include_hidden_states=true"]
    assert main(["build", "-i", str(tiny), "-o", str(out), "-p", "int4", "-q", *options]) == 0
    return str(out)
