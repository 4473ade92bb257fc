"""Write the versions that ``make`` installs, which uv resolves.

``python scripts/lock.py [OPTION OF UV ...]`` writes ``requirements/``: in ``lock.txt`` all that demo, tests, lint
and benchmarks need, in ``lowest.txt`` the lowest versions that ``pyproject.toml`` allows for what users need, with
what runs the tests, and in ``lowest-oracle.txt`` the lowest that go with the tests' oracle, in ``ray.txt`` what
the tests of clusters need, in ``clients.txt`` what clients of the server need that do not go with the rest.

``python scripts/lock.py --latest FOLDER`` writes the newest for this Python there, alone and with the oracle.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
UNIVERSAL = ["--universal", "--python-version", "3.10"]
RUNNER = ["hypothesis", "psutil", "pytest", "pytest-xdist"]
# The harness and the official runtime are not in the lowest: they ask for much newer versions of what users need.
ORACLE = [*RUNNER, "onnx", "peft", "torch", "transformers"]
# Extras that bring other builds of ONNX Runtime, or plugins for it.
DEVICES = ("cuda", "openvino", "webgpu")
# Too large for everybody, and locked apart.
APART = ("ray",)
LATEST_ORACLE = [*ORACLE, "lm-eval", "onnxruntime-genai; python_version >= '3.11'"]

NOTE = """\
# {}
# Made by `make update-lock`, not edited by hand. Without hashes, because torch has another build on every kind of
# machine, and without the CUDA packages, which torch's CUDA build asks for itself.
"""
LOCK = "The exact version of all that demo, tests, lint and benchmarks install, for Python 3.10 to 3.14."
LOWEST = "The lowest versions that pyproject.toml allows for what users need, and what runs the tests."
RAY = "What the tests of clusters install, in the versions of lock.txt as far as those are there too."
CLIENTS = (
    "The exact version of the server's clients that have an environment of their own: make test-clients."
)
LOWEST_ORACLE = "The lowest versions that pyproject.toml and the tests' oracle allow for what users need."


def normalized(requirement: str) -> str:
    """Return the name in a requirement, as locks spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def extras() -> list[str]:
    """Return the options of uv for all extras but those for devices, whose packages replace each other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [
        f"--extra={name}" for name in sorted(project["optional-dependencies"]) if name not in DEVICES + APART
    ]


def users() -> set[str]:
    """Return the names of what users need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {normalized(requirement) for requirement in project["dependencies"]}


def pins(path: Path) -> list[str]:
    """Return the lines of a lock that name a version."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"[^#\s]+==", line)]


def resolve(out: Path, head: str, sources: list[str], options: list[str], read: str = "") -> None:
    """Let uv write ``out``, whose versions stay as they are unless ``options`` upgrade them."""
    uv = str(Path(sys.executable).with_name("uv"))
    # A configuration of the user's could put addresses or hashes there.
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--no-annotate", "--no-header"]
    command += ["--python", sys.executable, *options, *sources, "-o", str(out)]
    environment = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    done = subprocess.run(command, cwd=ROOT, env=environment, input=read, text=True, check=False)
    if done.returncode:
        sys.exit(f"uv could not resolve {out}.")
    kept = [line for line in pins(out) if not re.match(r"cuda-|nvidia-|triton==", line)]
    out.write_text("\n".join([*NOTE.format(head).splitlines(), *kept, ""]), encoding="utf-8")


def resolve_end(out: Path, head: str, tools: list[str], options: list[str]) -> None:
    """Resolve what users need, and ``tools`` as they are locked; with the oracle, so is all else."""
    ours, names = users(), set(map(normalized, tools))
    with_oracle = "torch" in names
    held = [
        pin
        for pin in pins(REQUIREMENTS / "lock.txt")
        if normalized(pin) in names or (with_oracle and normalized(pin) not in ours)
    ]
    constraints = out.with_suffix(".constraints")
    constraints.write_text("\n".join(held), encoding="utf-8")
    try:
        resolve(out, head, ["pyproject.toml", "-"], [*options, "-c", str(constraints)], "\n".join(tools))
    finally:
        constraints.unlink()


def main(options: list[str]) -> None:
    """Write the versions that the command line asks for."""
    if options[:1] == ["--latest"]:
        folder = Path(options[1])
        folder.mkdir(parents=True, exist_ok=True)
        newest = "The newest versions that {} for what users need."
        resolve_end(folder / "latest.txt", newest.format("pyproject.toml allows"), RUNNER, ["--upgrade"])
        head = newest.format("pyproject.toml and the tests' oracle allow")
        resolve_end(folder / "latest-oracle.txt", head, LATEST_ORACLE, ["--upgrade"])
        return
    every = ["pyproject.toml", "requirements/tools.in"]
    resolve(REQUIREMENTS / "lock.txt", LOCK, every, [*UNIVERSAL, *extras(), *options])
    lowest = [*UNIVERSAL, "--resolution", "lowest-direct", *options]
    resolve_end(REQUIREMENTS / "lowest.txt", LOWEST, RUNNER, lowest)
    resolve_end(REQUIREMENTS / "lowest-oracle.txt", LOWEST_ORACLE, ORACLE, lowest)
    resolve(REQUIREMENTS / "clients.txt", CLIENTS, ["requirements/clients.in"], [*UNIVERSAL, *options])
    clusters = [
        *UNIVERSAL,
        "--extra=batch",
        "--extra=ray",
        "--extra=serve",
        "-c",
        "requirements/lock.txt",
        *options,
    ]
    resolve(REQUIREMENTS / "ray.txt", RAY, ["pyproject.toml", "-"], clusters, "\n".join(RUNNER))


if __name__ == "__main__":
    main(sys.argv[1:])
