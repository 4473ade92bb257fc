"""Where clients are installed that other packages' versions go with: make test-clients installs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_USUAL = Path(__file__).parents[2] / ".venvs" / "clients"


def python() -> Path:
    """Return the interpreter that has them."""
    found = Path(os.environ.get("CLIENTS_VENV", _USUAL)) / "bin" / "python"
    if not found.is_file():
        pytest.skip(f"there is no {found}: make test-clients installs these clients there")
    return found
