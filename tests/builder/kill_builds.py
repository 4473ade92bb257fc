"""Kill builds at random moments: there is always the old or the new artifact, whole, and the next build works.

    python -m tests.builder.kill_builds [MOMENTS [SEED]] [plain] [calibrated]

``make test-kill`` takes 30 moments of each kind: SIGKILL and SIGINT, a plain and a calibrated ``build --force``.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-phi3"
TEXT = ROOT / "docs" / "quantization.md"
PLAIN = ("--recipe", "fast")
CALIBRATED = ("--recipe", "balanced", "--calibration", str(TEXT), "--calibration-tokens", "256")
KINDS = {"plain": PLAIN, "calibrated": CALIBRATED}
# What Python itself says, with exit code 1, of a Ctrl-C before it runs a line of ortlm.
PYTHON_STARTS = ("Fatal Python error: init_", "Could not import runpy module")
SIGNALS = (signal.SIGKILL, signal.SIGINT)


def command(out: Path, how: tuple[str, ...], precision: str) -> list[str]:
    """Return the build; the precision tells old and new apart."""
    return [
        sys.executable, "-m", "ortlm", "build", "-i", str(MODEL), "-o", str(out), "--force", "-q", *how,
        "-p", precision,
    ]  # fmt: skip


def build(out: Path, how: tuple[str, ...], precision: str) -> float:
    """Build without a disturbance; return the seconds that it took."""
    began = time.monotonic()
    subprocess.run(command(out, how, precision), check=True, capture_output=True)
    return time.monotonic() - began


def whole(out: Path) -> str:
    """Return the precision of the artifact in ``out``; AssertionError unless it has all its files."""
    info = json.loads((out / "ortlm.json").read_text(encoding="utf-8"))["info"]
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    assert set(files) == {*info["files"], "ortlm.json"}, sorted(files)
    for name, entry in info["files"].items():
        raw = files[name].read_bytes()
        assert len(raw) == entry["bytes"], name
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"], name
    return str(info["precision"])


def interrupt(out: Path, how: tuple[str, ...], precision: str, number: signal.Signals, after: float) -> str:
    """Begin a build over the artifact in ``out``, send the signal ``after`` seconds; say what was found."""
    old = whole(out)
    child = subprocess.Popen(
        command(out, how, precision), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        child.wait(after)
    except subprocess.TimeoutExpired:
        # All readers see one of the two at every moment, also now.
        assert whole_at_some_moment(out), "no artifact while a build runs"
        child.send_signal(number)
    said = child.communicate(timeout=120)[1]
    code = child.returncode
    left = sorted(p.name for p in out.parent.iterdir() if p != out)
    if number == signal.SIGINT and code:
        assert code in (130, -signal.SIGINT) or said.startswith(PYTHON_STARTS), (code, said)
        assert all(name.endswith(".calibration") for name in left), left
    if code == 130:
        assert said.count("\n") == 1, said
    found = whole(out)
    assert found in (old, precision), found
    return f"exit {code}, {'old' if found == old else 'new'} artifact, next to it: {', '.join(left) or 'nothing'}"


def whole_at_some_moment(out: Path) -> bool:
    """Whether the artifact is there; it may be exchanged between two of its files being read."""
    return (out / "ortlm.json").is_file()


def run(moments: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS), *, tell: bool = True) -> None:
    """Try ``moments`` moments of every kind of build and signal."""
    choose = random.Random(seed)
    for kind in kinds:
        how = KINDS[kind]
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            seconds = max(build(out, how, "int8"), build(out, how, "int4"))
            for number in SIGNALS:
                for moment in range(moments):
                    old = whole(out)
                    new = "int8" if old == "int4" else "int4"
                    # More at the end, where names change.
                    part = choose.choice((choose.uniform(0, 1.1), choose.uniform(0.7, 1.1)))
                    found = interrupt(out, how, new, number, part * seconds)
                    build(out, how, new)
                    assert whole(out) == new
                    assert [p.name for p in Path(place).iterdir()] == ["out"]
                    if tell:
                        print(
                            f"{kind} {number.name} {moment + 1}: {part * seconds:.2f} s: {found}", flush=True
                        )


if __name__ == "__main__":
    words = sys.argv[1:]
    named = tuple(word for word in words if word in KINDS) or tuple(KINDS)
    numbers = [int(word) for word in words if word not in KINDS]
    run(*(numbers or [30])[:1], *(numbers[1:] or [random.SystemRandom().randrange(2**32)]), named)
