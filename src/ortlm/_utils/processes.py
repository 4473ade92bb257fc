"""Jobs in processes of their own, whose memory and time are those of one job alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ortlm.errors import Error

# The working folder, which may be a stranger's, is not among those that modules are imported from.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p not in ('', '.')]; import runpy; "
    "runpy.run_module(sys.argv[1], run_name='__main__', alter_sys=True)"
)


def in_process(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """Return what ``module``, run as a program, writes as its last line of JSON when it reads ``job`` on stdin.

    Raises Error, with what it wrote to stderr, if it fails.
    """
    home = str(Path(__file__).parents[2])
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    done = subprocess.run(
        [sys.executable, "-c", _START, module],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([home, *before])},
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise Error(
            f"a measuring process ended with code {done.returncode}. Usual cause: not enough memory. It wrote: "
            f"{done.stderr[-2_000:].strip() or 'nothing'}"
        )
    found: dict[str, Any] = json.loads(lines[-1])
    return found
