"""Is ARM64 right? The small model that ships with the project, built and run by an emulated processor.

    python benchmarks/check_arm64.py --work /tmp/arm64 --json benchmarks/results/check_arm64-qemu.json

Needs Linux on another processor, Python 3.11 or later with ortlm and pip, apt-get and dpkg-deb (Debian, Ubuntu)
and their package indexes; no root. Everything goes to --work, and a second run takes what is there: QEMU's user
mode (the one on PATH, if there is one), Python for ARM64 with what it depends on, unpacked, and the wheels for
aarch64 of what ortlm depends on, in the versions of requirements/lock.txt.

Builds: the folders of both processors have to be equal byte for byte, except for how long the build took, and, of
the build that calibrates, the weights. Runs: 24 greedy tokens of each folder on each emulated processor (--cpus)
against this one; where two tokens were so near that another order of sums may turn them, it says how near. Nothing
here is a measure of speed. Exit code 1: something failed or differs; 2: something is missing, and the message says
what.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from check_device import agreeing, error_of

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-phi3"
PROMPT = "def read_lines(path):\n"
# Target, precision, and recipe: "" for the default, which calibrates int4 and takes long here, so it is the last.
BUILDS = (
    ("cpu", "int4", "fast"),
    ("cpu", "int8", "fast"),
    ("cpu", "fp32", ""),
    ("mobile", "int4", "fast"),
    ("mobile", "int8", "fast"),
    ("cpu", "int4", ""),
)
CALIBRATED = {"cpu-int4"}
# int4 and int8 multiply rounded activations, and a rounding that falls the other way is seen in the logits.
TOLERANCE = {"fp32": 1e-5, "int4": 2e-2, "int8": 2e-2}
GLIBC = (17, 24, 26, 27, 28, 31, 34)
# What /proc/cpuinfo says of each processor that QEMU emulates: number of the part, and instruction sets. QEMU
# shows programs the file of this machine, which ONNX Runtime cannot read; it chooses kernels by both lines.
_OLD = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOT = f"{_OLD} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp ssbs"
PROCESSORS = {
    "cortex-a53": ("0xd03", _OLD),
    "cortex-a72": ("0xd08", _OLD),
    "cortex-a76": ("0xd0b", _DOT),
    "neoverse-n1": ("0xd0c", _DOT),
    # All that QEMU has: SVE, bf16 and int8 matrix instructions too.
    "max": ("0xd49", f"{_DOT} sve sve2 i8mm bf16 svei8mm svebf16"),
}
CPUINFO = """\
processor\t: {number}
BogoMIPS\t: 100.00
Features\t: {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part}
CPU revision\t: 1

"""


class Missing(Exception):
    """What this needs and does not find."""


def main() -> int:
    """Set up, build, run, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder to keep the emulated system in (about 700 MB)")
    parser.add_argument(
        "--cpus", default="neoverse-n1,max,cortex-a53", help="what QEMU emulates; the first one builds too"
    )
    parser.add_argument("--only", help="of the builds, as cpu-int4-fast,mobile-int8-fast")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--calibration-tokens", type=int, default=64, help="of the build that calibrates")
    parser.add_argument("--json", type=Path, help="file to write all results to")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = (args.work or Path(temporary)).resolve()
            return check(args, Emulated(work), work)
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(args: argparse.Namespace, arm: Emulated, work: Path) -> int:
    """Return the exit code."""
    began = time.perf_counter()
    cpus = args.cpus.split(",")
    machine = {"here": versions(here()), "arm64": versions(arm.command(cpus[0])), "qemu": arm.version()}
    print(json.dumps(machine), flush=True)
    different = [
        name for name in ("numpy", "onnxruntime") if machine["here"].get(name) != machine["arm64"].get(name)
    ]
    if different:
        print(f"note: {' and '.join(different)} of the two have other versions", flush=True)
    found: dict[str, Any] = {"device": "cpu", "machine": machine, "builds": [], "runs": []}
    shutil.rmtree(work / "built", ignore_errors=True)
    for target, precision, recipe in BUILDS:
        name = "-".join(filter(None, (target, precision, recipe)))
        if args.only and name not in args.only.split(","):
            continue
        folders = [work / "built" / where / name for where in ("here", "arm64")]
        build = {"target": target, "precision": precision, "recipe": recipe or "default"}
        row = {**build, **compare_builds(here(), arm.command(cpus[0]), *folders, args.calibration_tokens)}
        found["builds"].append(row)
        print(json.dumps(row), flush=True)
        for cpu in cpus:
            row = {**build, "cpu": cpu}
            row |= compare_runs(here(), arm.command(cpu), folders[0], work, args.tokens, TOLERANCE[precision])
            found["runs"].append(row)
            print(json.dumps(row), flush=True)
        if args.json:
            found["seconds"] = round(time.perf_counter() - began, 1)
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [*found["builds"], *found["runs"]]
    bad = [row for row in rows if not row["ok"]]
    print(f"\n{len(rows)} rows, {len(bad)} bad, {time.perf_counter() - began:.0f} s")
    return 1 if bad or not rows else 0


# --- comparing ----------------------------------------------------------------------------------------------

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def compare_builds(
    ours: Command, theirs: Command, here: Path, there: Path, calibration_tokens: int
) -> dict[str, Any]:
    """Build in both places and return which files differ, and what share of the weights' bytes does."""
    for command, out in ((ours, here), (theirs, there)):
        out.parent.mkdir(parents=True, exist_ok=True)
        target, precision, *recipe = out.name.split("-")
        done = command("build", target, precision, "".join(recipe), str(out), str(calibration_tokens))
        if done.returncode != 0:
            return {"ok": False, "error": done.stderr.strip()[-400:]}
    names = sorted(
        {str(p.relative_to(root)) for root in (here, there) for p in root.rglob("*") if p.is_file()}
    )
    differ = [name for name in names if not same(here / name, there / name)]
    # Calibration adds up products of activations, in an order that each processor's kernels choose.
    allowed = {"model.onnx.data", "ortlm.json"} if here.name in CALIBRATED else set()
    found: dict[str, Any] = {"ok": allowed.issuperset(differ), "files": len(names), "differ": differ}
    data = [np.fromfile(root / "model.onnx.data", np.uint8) for root in (here, there)]
    if len(data[0]) == len(data[1]) and "model.onnx.data" in differ:
        found["bytes_differ"] = float(f"{np.mean(data[0] != data[1]):.3g}")
    return found


def same(one: Path, other: Path) -> bool:
    """Return whether two files are equal, but for the time that a build took."""
    if not (one.is_file() and other.is_file()):
        return False
    texts = [path.read_bytes() for path in (one, other)]
    if one.name == "ortlm.json":
        manifests = [json.loads(text) for text in texts]
        for manifest in manifests:
            manifest["info"].pop("seconds")
        return bool(manifests[0] == manifests[1])
    return texts[0] == texts[1]


def compare_runs(
    ours: Command, theirs: Command, folder: Path, work: Path, tokens: int, limit: float
) -> dict[str, Any]:
    """Generate in both places from one folder and return how far the second is from the first."""
    results = []
    for name, command in (("here", ours), ("arm64", theirs)):
        file = work / f"{name}.npz"
        file.unlink(missing_ok=True)
        done = command("run", str(folder), str(file), str(tokens))
        if done.returncode != 0:
            return {"ok": False, "error": done.stderr.strip()[-400:]}
        results.append(dict(np.load(file)))
    want, got = results
    equal = agreeing(got["tokens"], want["tokens"])
    # As long as the tokens before were equal, both computed the same.
    shared = slice(0, min(equal + 1, tokens))
    error = error_of(got["logits"][shared], want["logits"][shared])
    row: dict[str, Any] = {"tokens": tokens, "equal": equal, "logits_error": error}
    near = True
    if equal < tokens:
        chosen, other = int(want["tokens"][equal]), int(got["tokens"][equal])
        gap = float(want["logits"][equal][chosen] - want["logits"][equal][other])
        moved = float(np.abs(got["logits"][equal] - want["logits"][equal]).max())
        near = gap <= 2 * moved
        row |= {"gap": float(f"{gap:.3g}"), "logits_moved": float(f"{moved:.3g}"), "near_tie": near}
    return {"ok": error <= limit and near, **row}


# --- in processes of their own ------------------------------------------------------------------------------


def child(what: str, *rest: str) -> int:
    """Build or run, on whatever processor this is."""
    interpreter = os.environ.get("CHECK_ARM64_PYTHON")
    if interpreter:
        # The kernel cannot start a program for ARM64, which is what Python takes itself for.
        sys.executable = interpreter
    if what == "versions":
        import onnxruntime

        print(
            json.dumps(
                {
                    "python": platform.python_version(),
                    "processor": platform.machine(),
                    "numpy": np.__version__,
                    "onnxruntime": onnxruntime.__version__,
                }
            )
        )
        return 0
    import ortlm

    if what == "build":
        from ortlm import BuildOptions

        target, precision, recipe, out, tokens = rest
        calibrated = Path(out).name in CALIBRATED
        options = BuildOptions(recipe=recipe or None, calibration_tokens=int(tokens) if calibrated else None)
        ortlm.build(MODEL, out, precision=precision, target=target, options=options, threads=1)
        return 0
    folder, file, tokens = rest
    lm = ortlm.load(folder, threads=1, device="cpu")
    loop = lm.loop()
    loop.start()
    logits = [loop.append([lm.tokenizer.encode(PROMPT)])[0].copy()]
    while len(logits) < int(tokens):
        logits.append(loop.step([int(logits[-1].argmax())])[0].copy())
    np.savez(file, logits=np.stack(logits), tokens=[int(row.argmax()) for row in logits])
    return 0


def here() -> Command:
    """Return what runs a child of this script on this machine's processor."""
    return runner([sys.executable], {**os.environ, "PYTHONPATH": str(ROOT / "src")})


def runner(
    start: Sequence[str], environment: dict[str, str], before: Callable[[], None] = lambda: None
) -> Command:
    """Return what runs a child of this script with the command ``start``, on one thread."""
    environment = {**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def run(*what: str) -> subprocess.CompletedProcess[str]:
        before()
        command = [*start, __file__, "--child", *what]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def versions(command: Command) -> dict[str, str]:
    """Return what a place runs."""
    done = command("versions")
    if done.returncode != 0:
        raise Missing(f"numpy and onnxruntime do not load: {done.stderr.strip()[-400:]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


# --- the emulated system ------------------------------------------------------------------------------------


class Emulated:
    """Python for ARM64 below ``work``, and QEMU to run it. Raises Missing, with what to do."""

    def __init__(self, work: Path) -> None:
        if sys.platform != "linux":
            raise Missing(f"QEMU's user mode exists on Linux only, and this is {sys.platform}.")
        if platform.machine() == "aarch64":
            raise Missing("this is an ARM64 machine: its tests say more than an emulation. Run make test.")
        if sys.version_info < (3, 11):
            raise Missing(f"this needs Python 3.11 or later, found {platform.python_version()}.")
        self._work = work
        self._root = work / "root"
        self._site = work / "site"
        self._status = work / "status"
        for name in ("root", "site", "host"):
            (work / name).mkdir(parents=True, exist_ok=True)
        self._status.touch()
        self._qemu = self._find_qemu()
        self._python = self._find_python()
        self._add_wheels()

    def command(self, cpu: str) -> Command:
        """Return what runs a child of this script on the processor ``cpu`` of QEMU."""
        if cpu not in PROCESSORS:
            raise Missing(f"there is no processor {cpu!r}; --cpus takes {', '.join(PROCESSORS)}.")
        start = self._work / f"python-{cpu}"
        start.write_text(
            f'#!/bin/sh\nexec "{self._qemu}" -cpu {cpu} -L "{self._root}" "{self._python}" "$@"\n',
            encoding="utf-8",
        )
        start.chmod(0o755)
        path = os.pathsep.join(map(str, (self._site, ROOT / "src")))
        environment = {
            key: value for key, value in os.environ.items() if key not in ("LD_LIBRARY_PATH", "LD_PRELOAD")
        }
        environment |= {"PYTHONPATH": path, "CHECK_ARM64_PYTHON": str(start)}
        return runner([str(start)], environment, before=lambda: self._show_processor(cpu))

    def version(self) -> str:
        """Return what QEMU says that it is."""
        done = subprocess.run([self._qemu, "--version"], capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[0]

    def _find_qemu(self) -> str:
        for name in ("qemu-aarch64-static", "qemu-aarch64"):
            on_path = shutil.which(name)
            if on_path:
                return on_path
        host = self._work / "host"
        if not (host / "usr" / "bin" / "qemu-aarch64-static").exists():
            self._unpack(host, ["qemu-user-static"])
        for name in ("qemu-aarch64-static", "qemu-aarch64"):
            if (host / "usr" / "bin" / name).exists():
                return str(host / "usr" / "bin" / name)
        raise Missing("the package qemu-user-static holds no qemu-aarch64. Install qemu-user, and run again.")

    def _find_python(self) -> Path:
        if not list(self._root.glob("usr/bin/python3.*")):
            self._unpack(self._root, ["python3", "libstdc++6", "libgomp1"], architecture="arm64")
        found = [path for path in sorted(self._root.glob("usr/bin/python3.*")) if path.suffix[1:].isdigit()]
        if not found:
            raise Missing(
                f"there is no usr/bin/python3.N in {self._root}. Remove that folder, and run again."
            )
        return found[-1]

    def _unpack(self, into: Path, packages: list[str], architecture: str | None = None) -> None:
        """Fetch Debian packages and what they depend on, and unpack them without installing any."""
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise Missing(
                    f"{tool} is not here, which fetches {', '.join(packages)}. On a system other than Debian "
                    f"install QEMU's user mode, and unpack Python for ARM64 into {self._root}."
                )
        state = self._work / f"apt-{architecture or 'host'}"
        for name in ("lists/partial", "archives/partial"):
            (state / name).mkdir(parents=True, exist_ok=True)
        # Nothing counts as installed, so that all dependencies are fetched.
        options = {
            "Dir::State::status": self._status,
            "Dir::State::Lists": state / "lists",
            "Dir::Cache": state,
            "Dir::Cache::archives": state / "archives",
            "APT::Install-Recommends": "false",
            "Debug::NoLocking": "true",
        }
        if architecture:
            options |= {"APT::Architecture": architecture, "APT::Architectures": architecture}
        if os.geteuid() == 0:
            # The user _apt cannot write here.
            options["APT::Sandbox::User"] = "root"
        flags = [f"-o{key}={value}" for key, value in options.items()]
        print(f"fetching {', '.join(packages)} for {architecture or 'this machine'}", flush=True)
        for command in (["update"], ["install", "--download-only", "--yes", *packages]):
            checked(["apt-get", "-q", *flags, *command], f"cannot fetch {', '.join(packages)}")
        for package in sorted((state / "archives").glob("*.deb")):
            checked(["dpkg-deb", "-x", str(package), str(into)], f"cannot unpack {package.name}")

    def _add_wheels(self) -> None:
        """Install what ortlm depends on, in the locked versions, as wheels for aarch64."""
        import tomllib

        done = self._site / ".installed"
        lock = ROOT / "requirements" / "lock.txt"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        asked = "\n".join([*project["dependencies"], lock.read_text(encoding="utf-8")])
        if done.is_file() and done.read_text(encoding="utf-8") == asked:
            return
        shutil.rmtree(self._site)
        version = self._python.name.removeprefix("python")
        platforms = [f"manylinux_2_{minor}_aarch64" for minor in GLIBC]
        print("fetching wheels for aarch64", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--target", str(self._site), "--only-binary=:all:", "--python-version", version]
        command += [f"--platform={name}" for name in (*platforms, "manylinux2014_aarch64")]
        command += ["--constraint", str(lock), *project["dependencies"]]
        checked(command, "pip cannot fetch the wheels for aarch64 of what ortlm depends on")
        done.write_text(asked, encoding="utf-8")

    def _show_processor(self, cpu: str) -> None:
        part, features = PROCESSORS[cpu]
        cpuinfo = self._root / "proc" / "cpuinfo"
        cpuinfo.parent.mkdir(exist_ok=True)
        lines = (
            CPUINFO.format(number=number, part=part, features=features)
            for number in range(os.cpu_count() or 1)
        )
        cpuinfo.write_text("".join(lines), encoding="utf-8")


def checked(command: Sequence[str], what: str) -> None:
    """Run a command; raises Missing, with its last lines, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise Missing(f"{what}: {' | '.join(said)}")


if __name__ == "__main__":
    sys.exit(main())
