"""Compare ortlm with other runtimes on one checkpoint: tokens per second of a prompt and of decoding.

    python benchmarks/peers.py CHECKPOINT --work /tmp/peers --prompt 512 --new 64 --runs 5

onnxruntime-genai runs the folder of its own builder and ortlm's, as it comes and with ``--threads``; llama.cpp
runs Q4_0 and Q4_K_M, OpenVINO GenAI its 4-bit weights. Peers and their models are made below ``--work`` and kept
for the next call; ortlm's model is built again. A peer that cannot be installed, built or run is reported with the
reason, and the others continue.

Measurements take turns, each in a process of its own; every run begins with another contender. Ratios are taken
within each run, so that a machine that is slower for a while does not decide. The first long prompt of a
process is reported besides the next one: memory that nobody has used before makes it slower. Linux only. Needs
the ``test`` extra, and a C++ compiler and cmake for llama.cpp, which is compiled for this processor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SCRIPTS = Path(__file__).parent / "peers"
_RATES = ("first_prefill_per_second", "prefill_per_second", "decode_per_second")
_MEASURE_SECONDS, _INSTALL_SECONDS = 1800, 7200
OURS = "ortlm"


class Failed(Exception):
    """A peer cannot be installed, built or run; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python environment of a peer: each step is what ``pip install`` is called with.

    ``borrow_torch``: use torch of the environment that runs this script, since another one takes gigabytes.
    """

    steps: tuple[tuple[str, ...], ...]
    variables: dict[str, str] = field(default_factory=dict)
    borrow_torch: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """How a peer is installed and makes its model; ``environment`` None is the one that runs this script.

    ``keep``: a model that an earlier call has made will do.
    """

    script: str
    options: tuple[str, ...]
    environment: str | None = None
    keep: bool = True


@dataclass(frozen=True, slots=True)
class Contender:
    """A row of the table: ``peer`` runs ``model`` (made by the peer ``maker``), with --threads or as it comes."""

    peer: str
    maker: str
    model: str = ""
    set_threads: bool = True


PEERS = {
    "ortlm": Peer("ortlm_peer.py", (), keep=False),
    "ortlm-fast": Peer("ortlm_peer.py", ("fast_prompts=true",), keep=False),
    "genai": Peer("genai_peer.py", ("precision=int4",)),
    "llama": Peer("llama_peer.py", ("types=Q4_0,Q4_K_M",), "llama"),
    "openvino": Peer("openvino_peer.py", (), "openvino"),
}
CONTENDERS = {
    OURS: Contender("ortlm", "ortlm"),
    "ortlm --fast-prompts": Contender("ortlm-fast", "ortlm-fast"),
    "genai, as it comes": Contender("genai", "genai", set_threads=False),
    "genai, threads set": Contender("genai", "genai"),
    "genai on ortlm's folder, as it comes": Contender("genai", "ortlm", set_threads=False),
    "genai on ortlm's folder, threads set": Contender("genai", "ortlm"),
    "llama.cpp Q4_0": Contender("llama", "llama", "Q4_0.gguf"),
    "llama.cpp Q4_K_M": Contender("llama", "llama", "Q4_K_M.gguf"),
    "OpenVINO GenAI int4": Contender("openvino", "openvino"),
}


def environments() -> dict[str, Environment]:
    """Return the environments to make, with the versions that these scripts are known to work with."""
    # GCC 12 deletes stores to AMX's tile configuration as dead, and the first product crashes.
    flags = "-fno-tree-dse -fno-dse" if 0 < _gcc_major() < 14 else ""
    cmake = ["-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF", "-DMTMD_BUILD=OFF"]
    cmake += [f"-DCMAKE_{language}_FLAGS='{flags}'" for language in ("C", "CXX") if flags]
    variables = {"CMAKE_ARGS": " ".join(cmake), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    native = ("--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36")
    tools = (
        "openvino-genai==2026.4.1.0",
        "nncf==3.4.0",
        "transformers==5.5.4",
        "huggingface-hub<1.22",
        # A later one, which torch's environment may hold, needs a later hub.
        "datasets==4.4.1",
        "requests",
    )
    return {
        "llama": Environment((("gguf==0.19.0", "numpy"), native), variables),
        # By their metadata both want torchvision, which brings a torch of its own and is for images only.
        "openvino": Environment(
            (tools, ("--no-deps", "optimum==2.3.0", "optimum-intel==2.2.0")), borrow_torch=True
        ),
    }


def _gcc_major() -> int:
    """Return the major version of g++, 0 if another compiler is asked for or there is none."""
    if "CXX" in os.environ or shutil.which("g++") is None:
        return 0
    done = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=False)
    number = done.stdout.strip().partition(".")[0]
    return int(number) if number.isdigit() else 0


def run_logged(
    command: list[str], log: Path, *, seconds: float, variables: dict[str, str] | None = None
) -> str:
    """Return what ``command`` writes to stdout; all goes to ``log``. Raises Failed with the reason."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # A limit on threads that somebody has set for other programs would decide here.
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=clean | (variables or {}),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"did not end within {seconds:.0f} s") from error
    log.write_text(f"{done.stdout}\n{done.stderr}", encoding="utf-8")
    if done.returncode:
        lines = [
            line.strip() for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if line.strip()
        ]
        last = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
        raise Failed(f"code {done.returncode}: {last[:300]} (see {log})")
    return done.stdout


def python_of(name: str | None, work: Path) -> str:
    """Return the interpreter of the environment ``name``, which is made if it is not there. Raises Failed."""
    if name is None:
        return sys.executable
    wanted, folder = environments()[name], work / f"env-{name}"
    python, mark = folder / "bin" / "python", folder / "made"
    recipe = repr(wanted)
    if mark.is_file() and mark.read_text(encoding="utf-8") == recipe:
        return str(python)
    print(f"installing {name}; this may take many minutes", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    log = work / "logs" / f"install-{name}.txt"
    run_logged([sys.executable, "-m", "venv", str(folder)], log, seconds=600)
    if wanted.borrow_torch:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        path = folder / "lib" / version / "site-packages" / "torch_of_caller.pth"
        path.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    for step in wanted.steps:
        command = [str(python), "-m", "pip", "install", *step]
        run_logged(command, log, seconds=_INSTALL_SECONDS, variables=wanted.variables)
    mark.write_text(recipe, encoding="utf-8")
    return str(python)


def model_of(name: str, checkpoint: Path, work: Path) -> Path:
    """Return the folder of the model that ``name`` makes of ``checkpoint``. Raises Failed."""
    peer = PEERS[name]
    config = (checkpoint / "config.json").read_bytes()
    recipe = environments().get(peer.environment or "")
    told = f"{checkpoint.resolve()} {peer.options} {recipe}".encode()
    folder = work / "models" / f"{name}-{hashlib.sha256(config + told).hexdigest()[:12]}"
    mark = folder.with_name(f"{folder.name}.made")
    if peer.keep and mark.is_file():
        return folder
    python = python_of(peer.environment, work)
    print(f"{name} makes its model", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [python, str(_SCRIPTS / peer.script), "make", str(checkpoint), str(folder), *peer.options]
    run_logged(command, work / "logs" / f"make-{name}.txt", seconds=_INSTALL_SECONDS)
    mark.touch()
    return folder


def prepare(
    names: list[str], checkpoint: Path, work: Path, failed: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """Return interpreter and model of every contender; of others ``failed`` gets the reason."""
    models: dict[str, Path | Failed] = {}
    ready: dict[str, tuple[str, str]] = {}
    for name in names:
        contender = CONTENDERS[name]
        try:
            python = python_of(PEERS[contender.peer].environment, work)
            maker = contender.maker
            if maker not in models:
                try:
                    models[maker] = model_of(maker, checkpoint, work)
                except Failed as error:
                    models[maker] = error
            model = models[maker]
            if isinstance(model, Failed):
                raise model
            ready[name] = (python, str(model / contender.model))
        except Failed as error:
            failed[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    return ready


def measure(name: str, python: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one run of the contender ``name``, in a process of its own. Raises Failed."""
    contender = CONTENDERS[name]
    command = [python, str(_SCRIPTS / PEERS[contender.peer].script), "measure", model]
    command += [f"prompt={args.prompt}", f"new={args.new}"]
    if contender.set_threads:
        command.append(f"threads={args.threads}")
    log = args.work / "logs" / f"measure-{''.join(c if c.isalnum() else '-' for c in name)}.txt"
    out = run_logged(command, log, seconds=_MEASURE_SECONDS)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def measure_all(
    names: list[str], args: argparse.Namespace
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Return the figures of every run by contender, and why others have none."""
    failed: dict[str, str] = {}
    ready = prepare(names, args.checkpoint, args.work, failed)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ready}
    for number in range(args.runs):
        # Whoever comes first finds another machine than the others: each in turn.
        order = [*ready][number % max(1, len(ready)) :] + [*ready][: number % max(1, len(ready))]
        for name in order:
            if name in failed:
                continue
            try:
                found = measure(name, *ready[name], args)
            except Failed as error:
                failed[name] = str(error)
                del runs[name]
                print(f"run {number + 1} {name}: {error}", file=sys.stderr, flush=True)
                continue
            runs[name].append(found)
            first, prefill, decode = (found[key] for key in _RATES)
            speeds = f"prefill {first:.0f}, then {prefill:.0f} tokens/s, decode {decode:.1f} tokens/s"
            print(f"run {number + 1} {name}: {speeds}", file=sys.stderr, flush=True)
    return runs, failed


def spread(samples: list[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return spreads of all figures; of rates also the ratio to that of the fastest peer in the same run."""
    keys = ("load_seconds", "peak_mib", *_RATES)
    out: dict[str, dict[str, Any]] = {
        name: {key: spread([run[key] for run in found]) for key in keys} for name, found in runs.items()
    }
    # Another runtime on our folder runs our model, and is no peer.
    peers = [name for name in runs if not CONTENDERS[name].maker.startswith(OURS)]
    for key in _RATES if peers else ():
        best = max(peers, key=lambda name: float(out[name][key]["median"]))
        for name, found in runs.items():
            ratios = [run[key] / other[key] for run, other in zip(found, runs[best], strict=True)]
            out[name][f"{key}_to_best_peer"] = {**spread(ratios), "peer": best}
    return out


def table(summary: dict[str, dict[str, Any]], failed: dict[str, str]) -> str:
    """Return the figures as people read them."""
    titles = "first prefill t/s", "prefill t/s", "decode t/s"
    heads = "".join(f"{title:>22}{'x best peer':>20}" for title in titles)
    lines = [f"{'':<38}{heads}{'load s':>8}{'peak MiB':>10}"]
    for name, row in summary.items():
        cells = ""
        for key in _RATES:
            cells += f"{_text(row[key], 1):>22}"
            ratio = row.get(f"{key}_to_best_peer")
            cells += f"{_text(ratio, 2) if ratio else '':>20}"
        peak = row["peak_mib"]["median"]
        lines.append(f"{name:<38}{cells}{row['load_seconds']['median']:>8.2f}{peak:>10.0f}")
    lines += [f"{name}: not measured, {reason}" for name, reason in failed.items()]
    return "\n".join(lines)


def _text(found: dict[str, float], digits: int) -> str:
    median, low, high = (f"{found[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}-{high})"


def main() -> int:
    """Install, build, measure in turn, and print medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="Hugging Face folder of Phi-3's kind, bfloat16 weights")
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, models and logs")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, help="of all that are not run as they come; default: physical cores"
    )
    parser.add_argument(
        "--only", action="append", choices=sorted(PEERS), help="this peer; may be given again"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    args.work = args.work.resolve()
    if args.threads is None:
        from ortlm._utils.cpu import physical_cores

        args.threads = physical_cores() or os.cpu_count() or 1
    wanted = args.only or list(PEERS)
    names = [name for name, contender in CONTENDERS.items() if contender.peer in wanted]
    runs, failed = measure_all(names, args)
    summary = summarize(runs)
    print(f"\nmedian (min-max) of {args.runs}, prompt {args.prompt}, new {args.new}, threads {args.threads}")
    print(table(summary, failed))
    if args.json:
        result = {
            "schema": 1,
            "checkpoint": args.checkpoint.name,
            "prompt": args.prompt,
            "new": args.new,
            "threads": args.threads,
            "summary": summary,
            "failed": failed,
            "runs": runs,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if OURS in runs or OURS not in names else 1


if __name__ == "__main__":
    sys.exit(main())
