"""One process's measurements of a model: loading it, then each shape of batch and prompt once."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import open_artifact
from ortlm.runtime.engine.devices import DeviceRequest
from ortlm.runtime.engine.huge_pages import wait_for_huge_pages
from ortlm.runtime.language_model import LanguageModel

WARM_UP_TOKENS, WARM_UP_STEPS = 16, 4


def measure_model(
    path: str,
    *,
    threads: int,
    device: str | None,
    device_options: Mapping[str, str],
    shapes: Sequence[tuple[int, int]],
    new: int,
) -> dict[str, Any]:
    """Load the artifact ``path`` and measure every (batch, context) of ``shapes``, in this order.

    Seconds and bytes. ``private_bytes`` is memory that nothing else backs, None where the system does not
    tell; ``peak_bytes`` is the process's largest resident memory so far, mapped files included.
    """
    began = time.perf_counter()
    # Without the tokenizer, which no measurement needs.
    lm = LanguageModel(open_artifact(path), threads=threads, device=DeviceRequest(device, device_options))
    loaded = time.perf_counter() - began
    wait_for_huge_pages()
    private = _status_bytes("RssAnon")
    return {
        "device": lm.device.name,
        "load_seconds": loaded,
        "private_bytes": private,
        "states": [
            # What has one size is as much as one position.
            (math.prod(state.sizes) * state.dtype.bytes, 1 if state.fixed else state.window)
            for state in lm.loop().states
        ],
        "shapes": [measure_shape(lm, batch, context, new) for batch, context in shapes],
    }


def measure_shape(lm: LanguageModel, batch: int, context: int, new: int) -> dict[str, Any]:
    """Return the seconds of a prompt of ``context`` random tokens in ``batch`` rows, and of ``new`` greedy steps.

    ``first_token_seconds`` lasts from a new cache to the first token; ``prefill_seconds`` is the model's part
    of it. Tokens that end an answer are decoded on. A warm-up of the same batch goes before.
    """
    prompt = random_prompt(lm.vocab_size, batch, context)
    _decode(lm, [row[:WARM_UP_TOKENS] for row in prompt], WARM_UP_STEPS)
    gc.collect()
    return _decode(lm, prompt, new)


def random_prompt(vocab: int, batch: int, context: int) -> list[list[int]]:
    """Return the same random token ids on every call, [batch, context]."""
    found: list[list[int]] = np.random.default_rng(0).integers(0, vocab, (batch, context)).tolist()
    return found


def _decode(lm: LanguageModel, prompt: list[list[int]], new: int) -> dict[str, Any]:
    began = time.perf_counter()
    loop = lm.loop()
    loop.start(len(prompt))
    ready = time.perf_counter()
    logits = loop.append(prompt)
    fed = time.perf_counter()
    token: NDArray[np.int64] = logits.argmax(axis=1)
    first = time.perf_counter()
    for _ in range(new):
        token = loop.step(token).argmax(axis=1)
    ended = time.perf_counter()
    return {
        "prefill_seconds": fed - ready,
        "first_token_seconds": first - began,
        "decode_seconds": ended - first,
        "cache_buffer_bytes": loop.cache.nbytes,
        "recomputed": loop.recomputed,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int | None:
    """Return this process's largest resident memory so far, None where the system does not tell."""
    found = _status_bytes("VmHWM")
    if found is None and sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def _status_bytes(key: str) -> int | None:
    """Return a line of ``/proc/self/status`` in bytes. The peak of getrusage would include the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
