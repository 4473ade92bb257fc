"""Runtimes of other versions, each in an environment of its own: what they need, how they are made and called.

Environments lie in ``.runtimes`` (or ``$RUNTIMES_DIR``) and stay there. None has torch; models are built before,
where the tests run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
HOME = Path(os.environ.get("RUNTIMES_DIR", ROOT / ".runtimes"))
WEB = "1.30.0"


class Unavailable(Exception):
    """A runtime cannot be had here; the text says why."""


@dataclass(frozen=True)
class Runtime:
    """A runtime: what people call it, the packages that make it, and the program that asks it for tokens."""

    name: str
    packages: tuple[str, ...]
    program: str

    @property
    def onnxruntime(self) -> tuple[int, int]:
        """Major and minor version of the ONNX Runtime in it."""
        major, minor = self.packages[-1].replace("@", "==").split("==")[1].split(".")[:2]
        return int(major), int(minor)

    @property
    def folder(self) -> Path:
        """Where its environment lies."""
        return HOME / self.name.replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Case:
    """A model to run: its folder, the ids that it reads, how many greedy tokens it gives.

    Ids in ``never`` are not chosen. ``image`` is an image that stands before the text; only ortlm runs such
    cases. ``plain``: so does a program that hands what a graph returns to its next run, and knows nothing else.
    """

    name: str
    folder: str
    prompt: tuple[int, ...]
    steps: int
    never: tuple[int, ...]
    image: str | None = None
    plain: bool = True


def _onnxruntime(version: str) -> Runtime:
    return Runtime(f"onnxruntime {version}", (f"onnxruntime=={version}",), "python.py")


def _genai(version: str, onnxruntime: str) -> Runtime:
    return Runtime(
        f"onnxruntime-genai {version}, onnxruntime {onnxruntime}",
        (f"onnxruntime-genai=={version}", f"onnxruntime=={onnxruntime}"),
        "genai.py",
    )


# From the lowest that pyproject.toml allows to the newest; Python 3.10 gets none of them. onnxruntime-genai 0.18
# accepts 1.31 and later.
_VERSIONS = "1.24.4 1.25.1 1.26.0 1.27.0 1.28.0 1.29.0 1.30.0 1.31.0 1.31.1 1.32.0"
ONNXRUNTIMES = tuple(map(_onnxruntime, _VERSIONS.split()))
NEWEST = ONNXRUNTIMES[-1]
RUNTIMES = (
    *ONNXRUNTIMES,
    _genai("0.18.0", "1.31.0"),
    _genai("0.18.0", "1.31.1"),
    _genai("0.18.0", "1.32.0"),
    Runtime(f"onnxruntime-web {WEB}, wasm", (f"onnxruntime-web@{WEB}",), "web.mjs"),
)
# What continuous integration runs.
ENDS = (ONNXRUNTIMES[0], NEWEST)


def chosen(runtime: Runtime, wanted: str) -> bool:
    """Return whether ``wanted`` ("all", "ends", or a part of names) means ``runtime``."""
    return wanted == "all" or (
        runtime in ENDS if wanted == "ends" else bool(wanted) and wanted in runtime.name
    )


def apart(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Return the largest difference of two rows of logits, relative to the largest logit."""
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / max(map(abs, wanted))


def prepare(runtime: Runtime) -> None:
    """Make the environment of ``runtime``, if it is not there. Raises Unavailable."""
    web = runtime.program.endswith(".mjs")
    wanted = [*runtime.packages]
    if not web:
        # What ortlm itself needs, without the optional parts.
        needs = [need for need in requires("ortlm") or () if "extra ==" not in need]
        wanted += [need for need in needs if not need.startswith("onnxruntime")]
    mark = runtime.folder / ".complete"
    content = json.dumps([sys.version, wanted, (ROOT / "requirements" / "lock.txt").read_text()])
    if mark.is_file() and mark.read_text() == content:
        return
    shutil.rmtree(runtime.folder, ignore_errors=True)
    runtime.folder.mkdir(parents=True)
    if web:
        for tool in ("node", "npm"):
            if shutil.which(tool) is None:
                raise Unavailable(f"{runtime.name} needs {tool}, which is not installed")
        (runtime.folder / "package.json").write_text("{}")
        npm = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
        _install(runtime, npm, runtime.folder)
    else:
        # Everything but the runtime in the locked versions.
        locked = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
        limits = HOME / "constraints.txt"
        limits.write_text("\n".join(line for line in locked if not line.startswith("onnxruntime")) + "\n")
        # pip, as everything else is installed: what reaches the network for one does for the other.
        install = ["sh", "scripts/install.sh", str(runtime.folder), *wanted, "-c", str(limits)]
        _install(runtime, install, ROOT)
    mark.write_text(content)


def _install(runtime: Runtime, command: Sequence[str], where: Path) -> None:
    around = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=where, env=around, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise Unavailable(f"{runtime.name} cannot be installed: {' '.join(last).removeprefix('make: ')}")


def ask(runtime: Runtime, cases: Sequence[Case]) -> dict[str, Any]:
    """Return what ``runtime`` makes of ``cases``: {"version": …, "cases": {name: answer}}.

    An answer has "tokens", and "logits" of the prompt's last token, from the graph ``model.onnx``; if ortlm is
    there too, "ortlm" has the same, the "graph" that was loaded, and "ragged", the largest difference that a batch
    of uneven rows makes. What fails has "error" in place of all that.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answers = Path(folder) / "cases.json", Path(folder) / "answers.json"
        given.write_text(json.dumps([asdict(case) for case in cases]))
        program = PROGRAMS / runtime.program
        if program.suffix == ".mjs":
            # Modules are looked for next to the file that imports them.
            program = Path(shutil.copy(program, runtime.folder))
            command = ["node", str(program), str(given), str(answers)]
        else:
            command = [str(runtime.folder / "bin" / "python"), str(program), str(given), str(answers)]
        around = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        around |= {"PYTHONPATH": str(ROOT / "src"), "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=1800, check=False)
        if not answers.is_file():
            raise RuntimeError(f"{runtime.name} ended with {done.returncode}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(answers.read_text())
        return found
