"""The types that a user's type checker sees: the package holds py.typed, and its names mean what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import ortlm
from tests.examples.conftest import ROOT, User

PROGRAM = ROOT / "tests" / "examples" / "public_names.py"


def test_the_program_has_every_public_name() -> None:
    used = set(re.findall(r"\w+", PROGRAM.read_text(encoding="utf-8")))
    assert set(ortlm.__all__) <= used


@pytest.mark.slow
def test_strict(user: User) -> None:
    """As a user's mypy: installed packages are read for their types and not checked themselves."""
    pytest.importorskip("mypy")
    programs = [PROGRAM, *sorted((ROOT / "examples").glob("*.py"))]
    options = ["--strict", "--python-executable", user.python]
    options += ["--cache-dir", str(ROOT / ".mypy_cache" / ("installed" if user.isolated else "source"))]
    options += ["--config-file", os.devnull if user.isolated else str(ROOT / "pyproject.toml")]
    around = {} if user.isolated else {"MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, programs)],
        cwd=user.folder,
        env=user.environment | around,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("Success"), done.stdout + done.stderr
