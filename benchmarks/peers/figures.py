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

_WARM_UP_TOKENS, _WARM_UP_STEPS = 16, 4


def tokens(vocab: int, length: int, seed: int) -> list[int]:
    """Return random token ids, the same on every call with this ``seed``."""
    found: list[int] = np.random.default_rng(seed).integers(0, vocab, length).tolist()
    return found


def figures(
    decode: Callable[[list[int], int], tuple[float, float]],
    vocab: int,
    prompt: int,
    new: int,
    *,
    load: float,
    packages: Sequence[str],
    about: str = "",
) -> dict[str, Any]:
    """Measure a run and return what is reported of it.

    ``decode(ids, steps)`` computes ``ids``, then ``steps`` tokens after the first new one, and returns the
    seconds of both. A short text warms it up; then two prompts are measured, since memory that is used for the
    first time makes the first long one slower. ``packages`` are those whose versions matter, ``about`` is what
    the peer says of its build.
    """
    decode(tokens(vocab, _WARM_UP_TOKENS, seed=0), _WARM_UP_STEPS)
    first, _ = decode(tokens(vocab, prompt, seed=1), 1)
    prefill, decoding = decode(tokens(vocab, prompt, seed=2), new)
    return {
        "versions": {name: _version(name) for name in packages},
        "about": about,
        "load_seconds": load,
        "first_prefill_per_second": prompt / first,
        "prefill_per_second": prompt / prefill,
        "decode_per_second": new / decoding,
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
