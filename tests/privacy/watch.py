"""What commands do besides their work: which sockets they open, and which files they leave behind.

``python -m tests.privacy.watch --seconds 60`` runs every command on the small model that ships with the
project, in clean processes that stay for a minute, since telemetry is sent by timers, and prints what it saw;
under strace where there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ortlm

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "models" / "tiny-phi3"

# Runs in every process of Python, those that commands start too: tells of sockets to other machines.
_HOOK = """\
import os, sys
def hook(event, args):
    if event == "socket.__new__" and int(args[1]) in FAMILIES or event in ("socket.getaddrinfo", "socket.connect"):
        if event == "socket.connect" and not isinstance(args[1], tuple):
            return
        with open(os.environ["WATCH_LOG"], "a") as log:
            log.write(f"{event} {args[1:]!r}\\n")
FAMILIES = (2, 10, 30)  # AF_INET; AF_INET6 of Linux and of macOS
sys.addaudithook(hook)
"""
_RUN = """\
import sys, time
seconds, program = float(sys.argv[1]), sys.argv[2]
sys.argv[1:3] = []
if program == "lm_eval":
    from ortlm.lm_eval import main
else:
    from ortlm.cli import main
code = main()
time.sleep(seconds)
sys.exit(code)
"""
_TASK = """\
task: small
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

# With the filter in the kernel, calls that are not asked for do not stop: lm-evaluation-harness takes a third of
# the time.
_STRACE = ("strace", "--seccomp-bpf", "-f", "-qq", "-e", "trace=network")
_HARMLESS = re.compile(r'socket\(AF_INET6, SOCK_STREAM|bind\(\d+, .*"::1"|^socket.__new__ \((10|30), 1, ')


@dataclass(frozen=True, slots=True)
class Seen:
    """A finished command: its output, what Python's hook and strace told of sockets, and the files it left."""

    name: str
    code: int
    output: str
    hooked: tuple[str, ...]
    traced: tuple[str, ...] | None
    files: tuple[str, ...]


def commands(model: Path, work: Path) -> dict[str, tuple[str, list[str], str]]:
    """Return program, arguments and input of every command but ``build``; ``work`` is for its files."""
    (work / "data.jsonl").write_text('{"question": "a b", "answer": " c"}\n')
    (work / "task.yaml").write_text(_TASK.format(data=work / "data.jsonl"))
    text = work / "text.txt"
    text.write_text("def read_lines(path):\n    return [line.strip() for line in open(path)]\n" * 60)
    short = ["--context", "8", "--new", "2", "--runs", "1", "--buffer-mb", "1"]
    few = ["--tokens", "600", "--layers", "--reference", str(CHECKPOINT)]
    found = {
        "generate": ("ortlm", ["generate", str(model), "def f(", "-n", "8"], ""),
        "chat": ("ortlm", ["chat", str(model), "-n", "8"], "Hello\n/bye\n"),
        "embed": ("ortlm", ["embed", str(model), "a text"], ""),
        "inspect": ("ortlm", ["inspect", str(model), "--json"], ""),
        "bench": ("ortlm", ["bench", str(model), "--json", "-q", *short], ""),
        "evaluate": ("ortlm", ["evaluate", str(model), "--text", str(text), "-q", *few], ""),
    }
    if importlib.util.find_spec("lm_eval") is not None:
        arguments = ["run", "--model", "ortlm", "--model_args", f"path={model}", "--tasks", "small"]
        found["lm_eval"] = ("lm_eval", [*arguments, "--include_path", str(work)], "")
    return found


def build_command(output: Path, *more: str) -> tuple[str, list[str], str]:
    """Return the command that builds the small model into ``output``."""
    options = ["-p", "int4", "-e", "cpu", "-q", "--extra_options", "include_hidden_states=true"]
    return "ortlm", ["build", "-i", str(CHECKPOINT), "-o", str(output), *options, *more], ""


class Watched:
    """A command that runs in a clean process."""

    def __init__(
        self,
        name: str,
        command: tuple[str, Sequence[str], str],
        folder: Path,
        *,
        seconds: float = 0.0,
        strace: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        program, arguments, given = command
        self.name, self._given, self._folder = name, given, folder
        for part in ("home", "cache", "tmp", "hook"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "hook" / "sitecustomize.py").write_text(_HOOK)
        self._trace = folder / "trace" if strace else None
        words = [sys.executable, "-c", _RUN, str(seconds), program, *arguments]
        if strace:
            words = [*_STRACE, "-o", str(self._trace), *words]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=folder,
            env={
                **{
                    key: os.environ[key]
                    for key in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH")
                    if key in os.environ
                },
                "PYTHONPATH": os.pathsep.join([str(folder / "hook"), str(Path(ortlm.__file__).parents[1])]),
                "HOME": str(folder / "home"),
                "XDG_CACHE_HOME": str(folder / "cache"),
                "TMPDIR": str(folder / "tmp"),
                "OMP_NUM_THREADS": "1",
                "WATCH_LOG": str(folder / "log"),
                **(environment or {}),
            },
        )

    def finish(self) -> Seen:
        """Wait for the end and return what was seen."""
        output, _ = self._process.communicate(self._given)
        log = self._folder / "log"
        lines = log.read_text().splitlines() if log.is_file() else []
        traced = None
        if self._trace is not None:
            traced = tuple(line for line in self._trace.read_text().splitlines() if "AF_INET" in line)
        files = [
            path.relative_to(self._folder).as_posix()
            for part in ("home", "cache", "tmp")
            for path in (self._folder / part).rglob("*")
            if not path.is_dir()
        ]
        return Seen(self.name, self._process.returncode, output, tuple(lines), traced, tuple(sorted(files)))


def is_harmless(line: str) -> bool:
    """Whether a line of the hook or of strace is about a socket that reaches nothing.

    urllib3, which lm-evaluation-harness and old versions of huggingface_hub import, asks at once whether the
    system knows IPv6 by binding one to ::1.
    """
    return bool(_HARMLESS.search(line))


def has_strace() -> bool:
    """Whether strace is there and may trace."""
    if shutil.which("strace") is None:
        return False
    tried = subprocess.run([*_STRACE, "-o", os.devnull, "true"], capture_output=True, check=False)
    return not tried.returncode


def main() -> int:
    """Watch every command and print what was seen."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long each process stays (default: 60)")
    parser.add_argument("--only", help="one command")
    args = parser.parse_args()
    strace, bad = has_strace(), 0
    if not strace:
        print("there is no strace here: what libraries in C do is not seen")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = work / "model"
        build = build_command(model, "--recipe", "fast")
        seen = [Watched("build", build, work / "build", seconds=args.seconds, strace=strace).finish()]
        running = [
            Watched(name, command, work / name, seconds=args.seconds, strace=strace)
            for name, command in commands(model, work).items()
            if args.only in (None, name)
        ]
        seen += [watched.finish() for watched in running]
        for one in seen:
            lines = [*one.hooked, *(one.traced or ())]
            wrong = [line for line in lines if not (one.name == "lm_eval" and is_harmless(line))]
            bad += bool(wrong or one.code)
            sockets = f"{len(lines)} calls about sockets of AF_INET and AF_INET6, {len(wrong)} not harmless"
            left = ", ".join(one.files) or "nothing"
            print(f"{one.name}: exit code {one.code}, stayed {args.seconds:g} s; {sockets}; left {left}")
            for line in lines:
                print(f"    {line}")
            if one.code:
                print(one.output[-2_000:])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
