"""docs/devices.md says what benchmarks/results says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs import device_support

RENEW = "run python -m tests.docs.device_support"


def test_results_are_on_the_page() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "tabulate_devices.py"
    spec = importlib.util.spec_from_file_location("tabulate_devices", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert text.count(module.BEGIN) == text.count(module.END) == 1
    assert module.page(text) == text, "run python benchmarks/tabulate_devices.py"


def test_what_tests_run_is_written_down() -> None:
    assert json.loads(device_support.FILE.read_text(encoding="utf-8"))["tested"] == device_support.tested(), (
        RENEW
    )


@pytest.mark.slow
def test_what_is_refused_is_written_down(saved: Any) -> None:
    found = json.loads(device_support.FILE.read_text(encoding="utf-8"))["refused"]
    assert found == device_support.refused(lambda name: Path(saved(name).folder)), RENEW
