"""How long a new process takes from the shell to its first token, and where that time goes.

    python benchmarks/measure_start.py DIR --runs 5
    python benchmarks/measure_start.py DIR --before OLD/src --gguf MODEL.gguf --llama VENV/bin/python

DIR is a folder that ortlm built. Measured are ``ortlm generate`` for one token, from the shell to the end of the
process, and a program that does the same step by step. ``--before`` is the ``src`` folder of another version of
ortlm, ``--llama`` a Python that has llama-cpp-python, which loads ``--gguf`` and decodes one token. Each
measurement has a process of its own, they take turns, and every run begins with another. Medians are printed, with
the processor time that was used, which other programs on the machine change little, and the load of the machine.
The files are in the page cache. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PROMPT = "Hello there"
_OURS = """
import json, sys, time
began = time.perf_counter()
import ortlm
ortlm.load
imported = time.perf_counter()
lm = ortlm.load(sys.argv[1])
loaded = time.perf_counter()
lm.generate({prompt!r}, max_new_tokens=1, temperature=0)
print(json.dumps({{"import": imported - began, "load": loaded - imported, "first": time.perf_counter() - loaded}}))
"""
_LLAMA = """
import ctypes, json, sys, time
began = time.perf_counter()
import llama_cpp as l
imported = time.perf_counter()
l.llama_backend_init()
model = l.llama_model_load_from_file(sys.argv[1].encode(), l.llama_model_default_params())
params = l.llama_context_default_params()
params.n_ctx = 64
params.n_threads = params.n_threads_batch = int(sys.argv[2])
context = l.llama_init_from_model(model, params)
loaded = time.perf_counter()
ids = (ctypes.c_int32 * 2)(5, 6)
assert l.llama_decode(context, l.llama_batch_get_one(ids, 2)) == 0
l.llama_get_logits_ith(context, -1)[0]
print(json.dumps({"import": imported - began, "load": loaded - imported, "first": time.perf_counter() - loaded}))
"""


def measure(command: list[str], source: Path | None) -> dict[str, float]:
    """Return seconds and bytes of one process; what it prints as JSON is added."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    if source is not None:
        variables["PYTHONPATH"] = str(source)
    began = time.perf_counter()
    # wait4 gives what this child used, getrusage the largest of all.
    child = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    told = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[:4]} ended with {child.returncode}")
    found = {
        "wall": time.perf_counter() - began,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1000,
    }
    if told.startswith(b"{"):
        found |= json.loads(told)
    return found


def contenders(args: argparse.Namespace) -> dict[str, tuple[list[str], Path | None]]:
    """Return commands, and the source of ortlm that each is to import, by what they are called."""
    folder, ours = str(args.folder), _OURS.format(prompt=_PROMPT)
    command = [sys.executable, "-m", "ortlm", "generate", folder, _PROMPT, "-n", "1", "--temperature", "0"]
    program = [sys.executable, "-c", ours, folder]
    found: dict[str, tuple[list[str], Path | None]] = {
        "ortlm generate": (command, None),
        "ortlm": (program, None),
    }
    if args.before:
        found["ortlm generate, before"] = (command, args.before)
        found["ortlm, before"] = (program, args.before)
    if args.llama:
        threads = str(len(os.sched_getaffinity(0)))
        found["llama.cpp"] = ([args.llama, "-c", _LLAMA, str(args.gguf), threads], None)
    return found


def main() -> int:
    """Measure all in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, help="src folder of another version of ortlm")
    parser.add_argument("--llama", help="a Python that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp loads")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all runs there")
    args = parser.parse_args()
    if bool(args.llama) != bool(args.gguf):
        parser.error("--llama and --gguf go together")
    wanted = contenders(args)
    for command, source in wanted.values():
        measure(command, source)  # fills the page cache, and writes byte code
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    names = list(wanted)
    for turn in range(args.runs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append({**measure(*wanted[name]), "machine_load": os.getloadavg()[0]})
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    columns = ("wall", "import", "load", "first", "cpu", "peak_mb")
    print(f"{'median of ' + str(args.runs):24}" + "".join(f"{column:>10}" for column in columns))
    for name, found in runs.items():
        cells = [statistics.median(run[c] for run in found) if c in found[0] else None for c in columns]
        print(f"{name:24}" + "".join(f"{'':>10}" if x is None else f"{x:>10.2f}" for x in cells))
    busy = statistics.median(run["machine_load"] for found in runs.values() for run in found)
    print(f"load of the machine {busy:.1f}, {len(os.sched_getaffinity(0))} processors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
