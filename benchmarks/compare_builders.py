"""Compare ``ortlm build`` with onnxruntime-genai's model builder: time, memory and size of the result.

    python benchmarks/compare_builders.py --checkpoint DIR --precision int4 --runs 3

Both run as subprocesses in turn, with the same flags. Memory is that of the process and all its children,
sampled while they run: private memory (anonymous pages, which only swap can reclaim) apart from mapped files
(pages that the system may drop at any time). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

_MIB = 1 << 20
_COMMANDS = {
    "ortlm": [sys.executable, "-m", "ortlm", "build"],
    "genai": [sys.executable, "-m", "onnxruntime_genai.models.builder"],
}
# Resident memory counts mapped files; the private part is what a machine must really have.
_STATUS = {"VmHWM:": "high_water", "VmRSS:": "resident", "RssAnon:": "private", "RssFile:": "mapped"}


@dataclass(slots=True)
class Measured:
    """One build. ``seconds`` is wall time, ``cpu_seconds`` user and system time; all others are bytes.

    ``resident``, ``private`` and ``mapped`` are the highest sums over the process tree, each at its own
    moment. ``high_water`` is the kernel's exact peak of resident memory of the largest single process.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resident: int = 0
    private: int = 0
    mapped: int = 0
    high_water: int = 0
    output: int = 0


def memory_of(pid: int) -> dict[str, int]:
    """Return the memory of one process in bytes; empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {_STATUS[f[0]]: int(f[1]) * 1024 for f in fields if f and f[0] in _STATUS}


def tree_of(root: int) -> list[int]:
    """Return the process ``root`` and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - Path objects would triple the cost of a sample
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_bytes()
            except OSError:
                continue
            parents.setdefault(int(stat[stat.rindex(b")") + 2 :].split()[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found.extend(parents.get(pid, ()))
    return found


def run_measured(command: list[str], log: Path, *, every: float = 0.05) -> Measured:
    """Run ``command`` to its end with its output in ``log``. Raises SystemExit if it fails."""
    out = Measured()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    while True:
        # wait4 rather than poll: it alone tells the processor time of the whole tree.
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        sums = dict.fromkeys(("resident", "private", "mapped"), 0)
        for member in tree_of(process.pid):
            found = memory_of(member)
            out.high_water = max(out.high_water, found.pop("high_water", 0))
            for key, value in found.items():
                sums[key] += value
        out.resident = max(out.resident, sums["resident"])
        out.private = max(out.private, sums["private"])
        out.mapped = max(out.mapped, sums["mapped"])
        time.sleep(every)
    out.seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    out.cpu_seconds = usage.ru_utime + usage.ru_stime
    out.high_water = max(out.high_water, usage.ru_maxrss * 1024)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{shlex.join(command)} ended with code {process.returncode}:\n{tail}")
    return out


def size_of(folder: Path) -> int:
    """Return the bytes of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def middle(runs: list[Measured]) -> Measured:
    """Return the median of every figure."""
    table = [asdict(run) for run in runs]
    return Measured(**{key: statistics.median(row[key] for row in table) for key in table[0]})


def report(medians: dict[str, Measured]) -> str:
    """Return a table of the medians, with ratios where there are two columns."""
    names = list(medians)
    lines = [f"{'':<32}" + "".join(f"{name:>12}" for name in names) + ("   ratio" if len(names) == 2 else "")]
    rows = [
        ("wall time, s", "seconds", 1.0),
        ("processor time, s", "cpu_seconds", 1.0),
        ("peak private memory, MiB", "private", _MIB),
        ("peak mapped files, MiB", "mapped", _MIB),
        ("peak resident, MiB", "resident", _MIB),
        ("VmHWM of largest process, MiB", "high_water", _MIB),
        ("output, MiB", "output", _MIB),
    ]
    for label, key, unit in rows:
        values = [getattr(medians[name], key) / unit for name in names]
        line = f"{label:<32}" + "".join(f"{value:>12.1f}" for value in values)
        if len(values) == 2 and values[0]:
            line += f"{values[1] / values[0]:>8.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Build several times with both and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=sorted(_COMMANDS), help="run one builder alone")
    parser.add_argument("--ortlm-flags", default="", help="more flags for ortlm build, as one string")
    parser.add_argument("--genai-flags", default="", help="more flags for genai's builder, as one string")
    parser.add_argument("--work", type=Path, help="folder with room for one result; default: the system's")
    parser.add_argument("--keep", type=Path, help="keep the last results as KEEP/ortlm and KEEP/genai")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()

    names = [args.only] if args.only else ["ortlm", "genai"]
    more = {"ortlm": shlex.split(args.ortlm_flags), "genai": shlex.split(args.genai_flags)}
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for number in range(args.runs):
            for name in names:
                out = Path(folder) / name
                shutil.rmtree(out, ignore_errors=True)
                flags = ["-i", str(args.checkpoint), "-o", str(out), "-p", args.precision, "-e", "cpu"]
                command = [*_COMMANDS[name], *flags, "-c", str(Path(folder) / "cache"), *more[name]]
                found = run_measured(command, Path(folder) / "log.txt")
                found.output = size_of(out)
                runs[name].append(found)
                print(
                    f"run {number + 1} {name}: {found.seconds:.1f} s, private {found.private / _MIB:.0f} MiB, "
                    f"resident {found.resident / _MIB:.0f} MiB, output {found.output / _MIB:.1f} MiB",
                    flush=True,
                )
                if args.keep and number == args.runs - 1:
                    shutil.rmtree(args.keep / name, ignore_errors=True)
                    args.keep.mkdir(parents=True, exist_ok=True)
                    shutil.move(out, args.keep / name)
                else:
                    shutil.rmtree(out)

    medians = {name: middle(found) for name, found in runs.items()}
    print(
        f"\nmedian of {args.runs}; ratio is genai / ortlm" if len(names) == 2 else f"\nmedian of {args.runs}"
    )
    print(report(medians))
    if args.json:
        result = {
            "checkpoint_bytes": sum(f.stat().st_size for f in args.checkpoint.glob("*.safetensors")),
            "precision": args.precision,
            "flags": more,
            "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-genai", "onnx-ir")},
            "cores": len(os.sched_getaffinity(0)),
            "medians": {name: asdict(found) for name, found in medians.items()},
            "runs": {name: [asdict(run) for run in found] for name, found in runs.items()},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
