"""``python -m ortlm.bench.worker``: reads a job as JSON on stdin, measures, and writes the result on stdout.

A process of its own, so that memory and loading are those of this job alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ortlm.errors
from ortlm._utils import processes
from ortlm.errors import Error


def in_process(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of ``job`` from a new process. Raises what the job raised, Error if the process died."""
    found = processes.in_process("ortlm.bench.worker", job)
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
