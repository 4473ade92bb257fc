"""What all peers share: the same tokens, the same figures, and the two things that each script does.

    python PEER.py make CHECKPOINT OUT [KEY=VALUE ...]
    python PEER.py measure MODEL prompt=N new=N [threads=N]

Run by peers.py in the environment that the peer lives in, so it needs numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP_TOKENS, WARM_UP_STEPS = 16, 4


def tokens(vocab: int, length: int, *, warm_up: bool = False) -> list[int]:
    """Return random token ids, the same on every call; those of a warm-up are others."""
    found: list[int] = np.random.default_rng(int(warm_up)).integers(0, vocab, length).tolist()
    return found


def figures(
    load: float,
    prefill: float,
    decode: float,
    prompt: int,
    new: int,
    *,
    packages: Sequence[str],
    about: str = "",
) -> dict[str, Any]:
    """Return what is reported of a run: ``new`` tokens were decoded in ``decode`` seconds behind the first one.

    ``packages`` are those whose versions matter, ``about`` is what the peer says of its build.
    """
    return {
        "versions": {name: _version(name) for name in packages},
        "about": about,
        "load_seconds": load,
        "prefill_per_second": prompt / prefill,
        "decode_per_second": new / decode,
        "peak_mib": _peak_mib(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "not installed"


def _peak_mib() -> float:
    """Return this process's largest resident memory, mapped files included."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def main(
    make: Callable[[Path, Path, dict[str, str]], None],
    measure: Callable[[str, int, int, int | None], dict[str, Any]],
    arguments: Sequence[str],
) -> None:
    """Do what the command line says. The last line on stdout is what was measured, as JSON."""
    what, place, *rest = arguments
    if what == "make":
        make(Path(place), Path(rest[0]), _options(rest[1:]))
        return
    options = _options(rest)
    threads, prompt, new = options.get("threads"), int(options["prompt"]), int(options["new"])
    found = measure(place, prompt, new, int(threads) if threads else None)
    print("\n" + json.dumps(found))


def _options(words: Sequence[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)
