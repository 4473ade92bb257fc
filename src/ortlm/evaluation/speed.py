"""How fast a model is and how much memory it takes, measured in a separate process.

Run as a module, it measures what the JSON object on stdin names and prints what it found as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm._utils.formatting import one_line
from ortlm._utils.processes import in_process
from ortlm.errors import BadArtifact, Error

if TYPE_CHECKING:
    from ortlm.runtime.language_model import LanguageModel

PREFILL_TOKENS, DECODE_TOKENS, RUNS = 128, 32, 3
HOW = (
    "Median of {runs} runs after a warm-up, in a separate process: prefill of {prefill} tokens of the text, then "
    "{decode} greedy tokens, batch size 1. Load time is measured once, with files that may be in the page cache "
    "already. Resident memory is that of the process at the end."
)


def measure(
    path: Path,
    prompt: Sequence[int],
    *,
    context: int,
    threads: int | None = None,
    device: str | None = None,
    device_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return speeds (seconds, tokens per second) and memory (bytes) of the artifact in ``path``.

    ``prompt`` is cut to 128 tokens, or to what leaves room to decode in ``context``. Raises BadArtifact if the
    process fails.
    """
    decode = min(DECODE_TOKENS, max(1, context // 4))
    prefill = max(1, min(PREFILL_TOKENS, context - decode - 1, len(prompt)))
    wanted = {
        "path": str(path),
        "prompt": list(prompt[:prefill]),
        "decode": decode,
        "threads": threads,
        "device": device,
        "device_options": dict(device_options or {}),
    }
    try:
        measured = in_process("ortlm.evaluation.speed", wanted)
    except Error as error:
        raise BadArtifact(
            f"{path} could not be measured: {one_line(error)} Evaluate without speed (--no-speed) to get the rest."
        ) from error
    how = HOW.format(runs=RUNS, prefill=prefill, decode=decode)
    return {**measured, "prefill_tokens": prefill, "decode_tokens": decode, "runs": RUNS, "how": how}


def _measure_here(wanted: dict[str, Any]) -> dict[str, Any]:
    from ortlm.runtime.language_model import load

    begun = time.perf_counter()
    lm = load(
        wanted["path"],
        threads=wanted["threads"],
        device=wanted["device"],
        device_options=wanted["device_options"],
        prefix_caches=0,
    )
    loaded = time.perf_counter() - begun
    runs = [_run(lm, wanted["prompt"], wanted["decode"]) for _ in range(RUNS + 1)][1:]
    prefill, first, decode = (statistics.median(run[i] for run in runs) for i in range(3))
    return {
        "threads": lm.session.threads,
        "load_seconds": loaded,
        "prefill_tokens_per_second": len(wanted["prompt"]) / prefill,
        "first_token_seconds": first,
        "decode_tokens_per_second": wanted["decode"] / decode,
        **_memory(),
    }


def _run(lm: LanguageModel, prompt: list[int], decode: int) -> tuple[float, float, float]:
    """Return the seconds of the prefill, until the first token, and of the ``decode`` tokens after it."""
    begun = time.perf_counter()
    stream = lm.stream(
        prompt,
        max_new_tokens=decode + 1,
        ignore_eos=True,
        temperature=0,
        repetition_penalty=1.0,
        reuse_cache=False,
    )
    next(stream)
    first = time.perf_counter()
    for _ in stream:
        pass
    return stream.timings.prompt_seconds, first - begun, time.perf_counter() - first


def _memory() -> dict[str, int | None]:
    """Return how many bytes this process holds now, and held at most; None where the system does not say."""
    sizes: dict[str, int | None] = {"resident_bytes": None, "peak_bytes": None}
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return sizes
    # Not getrusage: its maximum includes that of the process that started this one.
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            sizes["resident_bytes" if name == "VmRSS" else "peak_bytes"] = int(value.split()[0]) * 1024
    return sizes


if __name__ == "__main__":
    print(json.dumps(_measure_here(json.load(sys.stdin))))
