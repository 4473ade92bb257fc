"""ortlm: builds with ``ortlm build``, decodes with its loop."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from figures import figures, main

_PACKAGES = ("ortlm", "onnxruntime")


def make(checkpoint: Path, out: Path, options: dict[str, str]) -> None:
    """Build ``checkpoint`` for the CPU: the int4 default, but rounded. Calibration changes no speed."""
    recipe = out.parent / "rounded.yaml"
    recipe.write_text("base: balanced\nalgorithm: rtn\n", encoding="utf-8")
    flags = ["-i", str(checkpoint), "-o", str(out), "-p", "int4", "-e", "cpu", "--force"]
    flags += ["--recipe", str(recipe), "--no-check"]
    if "fast_prompts" in options:
        flags.append("--fast-prompts")
    subprocess.run([sys.executable, "-m", "ortlm", "build", *flags], check=True)


def measure(folder: str, prompt: int, new: int, threads: int | None) -> dict[str, Any]:
    """Return the figures of one run."""
    import ortlm

    began = time.perf_counter()
    lm = ortlm.load(folder, threads=threads)
    loaded = time.perf_counter() - began

    def decode(ids: list[int], steps: int) -> tuple[float, float]:
        began = time.perf_counter()
        loop = lm.loop()
        loop.start()
        token = loop.append([ids]).argmax(axis=1)
        middle = time.perf_counter()
        for _ in range(steps):
            token = loop.step(token).argmax(axis=1)
        return middle - began, time.perf_counter() - middle

    return figures(decode, lm.vocab_size, prompt, new, load=loaded, packages=_PACKAGES)


if __name__ == "__main__":
    main(make, measure, sys.argv[1:])
