"""What is measured, how samples become figures, and what a measuring process reports."""

from __future__ import annotations

import pytest

from ortlm.bench import machine
from ortlm.bench.measure import random_prompt
from ortlm.bench.study import Study, spread
from ortlm.bench.worker import do, in_process
from ortlm.errors import BadArtifact, BadOption, Error


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batches": ()}, "batches must be one number or more"),
        ({"contexts": (4, 4)}, "contexts must be one number or more, each once"),
        ({"threads": (1, 0)}, "threads must be at least 1, found 0"),
        ({"new": 0}, "new must be at least 1"),
        ({"runs": -1}, "runs must be at least 1"),
        ({"buffer": 0}, "buffer must be at least 1"),
    ],
)
def test_wrong_numbers(wrong, message):
    with pytest.raises(BadOption, match=message):
        Study(**wrong)


def test_shapes_grow():
    assert Study(batches=(4, 1), contexts=(512, 128)).shapes == [(1, 128), (1, 512), (4, 128), (4, 512)]


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "samples": [3.0, 1.0, 2.0]}
    assert spread([1.0, None]) is None


def test_prompts_repeat_and_fit_the_vocabulary():
    found = random_prompt(100, 2, 50)
    assert found == random_prompt(100, 2, 50)
    assert found[0] != found[1]
    assert {len(row) for row in found} == {50}
    assert max(map(max, found)) < 100


def test_the_buffer_is_larger_than_the_cache_and_leaves_memory(monkeypatch):
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 500_000_000)
    monkeypatch.setattr(machine, "_free_bytes", lambda: 16_000_000_000)
    assert machine.buffer_bytes() == 2_000_000_000
    assert machine.buffer_bytes(5_000_000) == 5_000_000
    monkeypatch.setattr(machine, "_free_bytes", lambda: 2_000_000_000)
    assert machine.buffer_bytes() == 500_000_000
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: None)
    monkeypatch.setattr(machine, "_free_bytes", lambda: 16_000_000_000)
    assert machine.buffer_bytes() == 1_000_000_000


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "_SIDE", 256)
    found = do({"kind": "machine", "threads": 1, "size": 1 << 20})
    assert found["bandwidth"]["bytes_per_second"] > 0
    assert found["bandwidth"]["buffer_bytes"] == 1 << 20
    assert set(found["int8"]) == {"MatMulInteger", "MatMulNBits"}
    assert min(found["int8"].values()) > 0
    assert machine.environment()["cpu"]


@pytest.mark.parametrize(("text", "size"), [("480M", 480 << 20), ("32K", 32 << 10), ("", 0), ("M", 0)])
def test_cache_sizes(text, size):
    assert machine._size(text) == size


def test_what_a_process_raises_comes_back(tmp_path):
    job = {"kind": "model", "path": str(tmp_path), "threads": 1, "device": None, "device_options": {}}
    job |= {"shapes": [], "new": 1}
    with pytest.raises(BadArtifact, match=r"holds neither ortlm\.json nor"):
        in_process(job)


def test_a_process_that_dies():
    with pytest.raises(Error, match=r"(?s)ended with code 1\. .*unexpected keyword"):
        in_process({"kind": "machine", "size": 1, "speed": 1})
