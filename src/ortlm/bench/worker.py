"""``python -m ortlm.bench.worker``: reads a job as JSON on stdin, measures, and writes the result on stdout.

A process of its own, so that memory and loading are those of this job alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import ortlm.errors
from ortlm.errors import Error


def in_process(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of ``job`` from a new process. Raises what the job raised, Error if the process died."""
    done = subprocess.run(
        [sys.executable, "-m", "ortlm.bench.worker"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Error(
            f"a measuring process ended with code {done.returncode}. Usual cause: not enough memory; try a "
            f"smaller --batch or --context. It wrote: {done.stderr[-2000:].strip() or 'nothing'}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise getattr(ortlm.errors, found["error"], Error)(found["message"])
    return found


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a job: its ``kind`` is "machine" or "model", the rest are arguments."""
    arguments = {key: value for key, value in job.items() if key != "kind"}
    try:
        if job["kind"] == "machine":
            from ortlm.bench.machine import measure_machine

            return measure_machine(**arguments)
        from ortlm.bench.measure import measure_model

        return measure_model(**arguments)
    except Error as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    print(json.dumps(do(json.load(sys.stdin))))
