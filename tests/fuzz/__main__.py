"""``make fuzz``: all doors again and again with new seeds, for FUZZ_MINUTES.

``python -m tests.fuzz SEED [DOOR ...]`` repeats a seed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
# Of one door in one round.
SECONDS = "20"
# A test that asks for more memory than any valid input needs shall fail rather than take the machine down.
MEMORY_BYTES = 24 << 30


def run(seed: int, doors: list[str]) -> list[str]:
    """Run each of ``doors`` in a process of its own; return those that failed."""
    failed = []
    for door in doors:
        command = [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}",
            str(FOLDER / door),
        ]  # fmt: skip
        done = subprocess.run(
            command,
            env={
                **os.environ,
                "FUZZ_SEED": str(seed),
                "FUZZ_SECONDS": os.environ.get("FUZZ_SECONDS", SECONDS),
            },
            capture_output=True,
            text=True,
            errors="replace",
            preexec_fn=_limit_memory if sys.platform == "linux" else None,
            check=False,
        )
        if done.returncode:
            failed.append(door)
            print(done.stdout[-6_000:], done.stderr[-2_000:], sep="\n")
            print(
                f"FAILED: {door}, exit code {done.returncode}; repeat with: python -m tests.fuzz {seed} {door}"
            )
    return failed


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> int:
    """Loop, or run the seed and the doors that the command line names."""
    doors = sys.argv[2:] or sorted(path.name for path in FOLDER.glob("test_*.py"))
    if len(sys.argv) > 1:
        return 1 if run(int(sys.argv[1]), doors) else 0
    end = time.monotonic() + 60 * float(os.environ.get("FUZZ_MINUTES", "60"))
    failures: list[str] = []
    rounds = 0
    while time.monotonic() < end:
        seed = random.SystemRandom().randrange(2**32)
        failures += [f"{seed} {door}" for door in run(seed, doors)]
        rounds += 1
        print(
            f"round {rounds} (seed {seed}): {len(doors)} doors, {len(failures)} failures so far", flush=True
        )
    for failure in failures:
        print(f"python -m tests.fuzz {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
