"""What each target refuses and what tests run of it, found in the code and in the tests, for docs/devices.md.

python -m tests.docs.device_support       writes benchmarks/results/device_support.json
python benchmarks/tabulate_devices.py     writes the page
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.errors import BadOption
from ortlm.target import TARGETS
from tests.architectures import families
from tests.builder import test_pipeline
from tests.graph import test_parity
from tests.runtime import test_plugins

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "device_support.json"
# What a refusal or a note says, and the page.
REASONS = {
    "caps attention scores": "capped scores",
    "is a mixture of experts": "mixtures of experts",
    "states of one size": "states of one size",
    "ignores the model's window": "context beyond a window",
}


def main() -> None:
    """Write what is found."""
    with tempfile.TemporaryDirectory() as folder:

        def save(name: str) -> Path:
            families.save(name, Path(folder) / name)
            return Path(folder) / name

        found = {"refused": refused(save), "tested": tested()}
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def refused(save: Callable[[str], Path]) -> dict[str, dict[str, list[str]]]:
    """Return, by target and reason, the families that a build refuses; ``save`` returns a family's checkpoint."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in TARGETS}
    for family in families.FAMILIES:
        checkpoint = save(family)
        for target in TARGETS.values():
            # Nothing is refused in one precision alone.
            request = BuildRequest(checkpoint, precision=next(iter(target.precisions)), target=target.name)
            try:
                said: tuple[str, ...] = tuple(prepare(request).architecture.notes)
            except BadOption as error:
                said = (str(error),)
                if not any(part in said[0] for part in REASONS):
                    raise
            for part, reason in REASONS.items():
                if any(part in text for text in said):
                    found[target.name].setdefault(reason, []).append(family)
    return found


def tested() -> dict[str, dict[str, str]]:
    """Return, by target and precision, what ``make test`` runs: read from the tests' parameters."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for target, precision in test_pipeline.EVERY:
        count = len(values(test_pipeline.test_every_target, "name"))
        # The CPU has no bf16.
        how = "checked" if precision == "bf16" else "run on the CPU"
        found[target][precision] = f"{count} graphs, {how}"
    found["cpu"]["fp32"] = f"{len(values(test_parity.test_prompt_and_decode, 'name'))} families"
    for precision in values(test_parity.test_quantized_runs, "precision"):
        found["cpu"][precision] = f"{len(values(test_parity.test_quantized_runs, 'name'))} families"
    half = test_plugins.test_activations_in_fp16
    for precision in values(half, "precision"):
        found["webgpu"][precision] = f"{len(values(half, 'name'))} families, where the plugin is installed"
    found["webgpu"]["fp32"] = f"{len(test_plugins.FAMILIES)} families, where the plugin is installed"
    return dict(found)


def values(test: Callable[..., None], name: str) -> list[Any]:
    """Return what a test takes as its parameter ``name``."""
    marks: list[Any] = getattr(test, "pytestmark", [])
    return list(next(mark.args[1] for mark in marks if mark.name == "parametrize" and mark.args[0] == name))


if __name__ == "__main__":
    main()
