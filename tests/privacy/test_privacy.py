"""No command opens a socket, leaves notes for telemetry, or writes who and where into what it makes.

Commands run in clean processes: nothing that tests set is there to hide what a user would get.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from packaging.version import Version

import ortlm
from tests.privacy.watch import CHECKPOINT, Watched, build_command, commands, has_strace, is_harmless

CANARY = "canary"
PERSON = {
    "USER": "canary-user",
    "LOGNAME": "canary-user",
    "USERNAME": "canary-user",
    "HOSTNAME": "canary-host",
    "EMAIL": "canary@example.com",
    "HF_TOKEN": "hf_canarycanarycanarycanarycanary",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("canary-person")


@pytest.fixture(scope="module")
def seen(work):
    """Return what was seen of each command, all run once: build first, then the others side by side."""
    text = work / "own-text.txt"
    text.write_text("The fox reads a book about trees, and the trees read one about foxes. " * 200)
    calibrated = ["--recipe", "balanced", "--calibration", str(text), "--calibration-tokens", "256"]
    strace = has_strace()
    model = work / "model"
    build = Watched(
        "build", build_command(model, *calibrated), work / "build", strace=strace, environment=PERSON
    )
    found = {"build": build.finish()}
    assert found["build"].code == 0, found["build"].output
    names = commands(model, work)
    running = [
        Watched(name, command, work / name, strace=strace, environment=PERSON)
        for name, command in names.items()
    ]
    return found | {watched.name: watched.finish() for watched in running}


MODULES = ["ortlm", "ortlm.genai", "ortlm.lm_eval", "ortlm.cli", "ortlm.models.builder"]
NAMES = ["build", "generate", "chat", "embed", "inspect", "bench", "evaluate", "lm_eval"]


@pytest.mark.parametrize("name", NAMES)
def test_commands(seen, name):
    if name not in seen:
        pytest.skip("lm-evaluation-harness is not installed")
    one = seen[name]
    assert one.code == 0, one.output
    for telltale in ("deviceid", "onnxruntime.db", ".ses", "Microsoft", "telemetry"):
        assert not any(telltale in file for file in one.files), one.files
    # huggingface_hub, which a build imports, used urllib3 until 1.0.
    urllib3 = ["lm_eval"] + ["build"] * (Version(huggingface_hub.__version__) < Version("1"))
    allowed = is_harmless if name in urllib3 else (lambda line: False)
    assert [line for line in one.hooked if not allowed(line)] == []
    if one.traced is not None:
        assert [line for line in one.traced if not allowed(line)] == []


def test_what_it_would_look_like(work):
    """The watch notices sockets, those of other processes too."""
    program = "import socket, subprocess, sys\n"
    program += "subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'])\n"
    program += "socket.socket(socket.AF_INET6).close()\n"
    watched = Watched("generate", ("ortlm", ["--version"], ""), work / "noticed")
    watched.finish()
    hook = {"PYTHONPATH": str(work / "noticed" / "hook"), "WATCH_LOG": str(work / "noticed" / "log")}
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **hook}, check=True)
    assert (work / "noticed" / "log").read_text().count("socket.__new__") == 2


def test_what_is_written_tells_nothing_of_its_maker(seen, work):
    words = {CANARY, str(work), str(Path.home()), str(CHECKPOINT), str(CHECKPOINT.parent)}
    if len(socket.gethostname()) > 5:
        words.add(socket.gethostname())
    words = {word for word in words if len(word) > 5 and word != "/root"}
    files = [path for path in (work / "model").rglob("*") if path.is_file()]
    assert {"ortlm.json", "report.json", "report.html", "README.md", "model.onnx"} <= {
        path.name for path in files
    }
    contents = {str(path.relative_to(work)): path.read_bytes().lower() for path in files}
    contents |= {f"output of {name}": seen[name].output.encode().lower() for name in ("bench", "embed")}
    for name, raw in contents.items():
        for word in words:
            for code in ("utf-8", "utf-16-le"):
                assert word.lower().encode(code) not in raw, f"{name} holds {word}"


@pytest.mark.parametrize(
    ("given", "kept"), [({}, "1 1"), ({"ORT_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_TELEMETRY": "0"}, "0 0")]
)
@pytest.mark.parametrize(
    "module",
    [
        "ortlm",
        "ortlm.genai",
        "ortlm.lm_eval",
        "ortlm.cli",
        "ortlm.models.builder",
        "ortlm.runtime.engine.session",
    ],
)
def test_telemetry_is_off_unless_a_user_wants_it(given, kept, module):
    code = (
        f"import os, sys; import {module}; print(os.environ['ORT_DISABLE_TELEMETRY'], "
        "os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    if module == "ortlm":
        code += "; assert 'onnxruntime' not in sys.modules"
    keep = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "HOME")
    clean = {key: os.environ[key] for key in keep if key in os.environ}
    clean["PYTHONPATH"] = str(Path(ortlm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == kept


def test_a_strangers_folder_is_no_place_for_modules(work):
    """Measuring processes import nothing from the working folder, which may be an artifact's."""
    from ortlm._utils.processes import in_process

    folder = work / "stranger"
    folder.mkdir()
    for name in ("numpy.py", "json.py", "ortlm.py", "onnxruntime.py", "runpy.py"):
        (folder / name).write_text("import pathlib; pathlib.Path('owned').touch(); raise SystemExit(9)\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        found = in_process("ortlm.bench.worker", {"kind": "machine", "threads": 1, "size": 1 << 20})
    finally:
        os.chdir(before)
    assert "bandwidth" in found
    assert not (folder / "owned").exists()
