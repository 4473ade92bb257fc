"""Schemathesis sends what /openapi.json allows, and what it does not, to every endpoint.

make test-clients CLIENTS=schemathesis
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ortlm.serving.engine import EngineOptions
from tests.clients import wanted
from tests.clients.environment import python
from tests.server.conftest import lm, serve, trained

pytestmark = [wanted("schemathesis")]
pytest.importorskip("fastapi")

__all__ = ["lm", "serve", "trained"]
SECONDS = 90
# What a schema cannot say: which models there are, what a template takes, what fits into the context.
EXCLUDED = "positive_data_acceptance"


def test_nothing_that_comes_makes_the_server_fail(
    serve: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it answer in a way that its description does not know."""
    program = python().with_name("schemathesis")
    with serve(engine=EngineOptions(seconds=10.0)) as live:
        command = [
            str(program), "run", f"{live.url}/openapi.json", "--max-time", str(SECONDS), "--max-examples", "100",
            "--seed", "1", "--exclude-checks", EXCLUDED, "--continue-on-failure", "--no-shrink", "--no-color",
            "--request-timeout", "60", "--warnings", "off", "--generation-database", "none",
        ]  # fmt: skip
        around = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            command, cwd=tmp_path, env=around, capture_output=True, text=True, timeout=600, check=False
        )
        live.wait_until_idle()
        assert live.stats.cache_tokens == 0
    assert done.returncode == 0, done.stdout[-4000:]
    count = re.search(r"(\d+) generated", done.stdout)
    assert count is not None
    assert int(count[1]) > 500
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
