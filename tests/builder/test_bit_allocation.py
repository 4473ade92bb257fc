"""Bits where they matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ortlm._utils.formatting import parse_bytes
from ortlm.builder.bit_allocation import Point, _Builds, _groups, _Matrices, search
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.cli import main
from ortlm.errors import BadOption
from ortlm.quant.recipe import Rule

FAST = BuildOptions(recipe="fast", layers=2)


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def test_smallest_within_a_divergence(tiny: Path, tmp_path: Path) -> None:
    allocation = search(BuildRequest(tiny, options=FAST), tmp_path / "out", target_kld=0.01, threads=1)
    assert allocation.chosen.kld <= 0.01
    assert all(p.kld > 0.01 for p in allocation.frontier if p.bytes < allocation.chosen.bytes)
    assert [p.bytes for p in allocation.frontier] == sorted(p.bytes for p in allocation.frontier)
    # With 4 bits in every matrix it is not near enough, so nothing was built with fewer.
    assert {4, 5, 6, 8} >= set(allocation.chosen.bits.values()) >= {4, 5}
    assert set(allocation.frontier[-1].bits.values()) == {8}
    assert not list(tmp_path.iterdir())


def test_a_size_on_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["build", "-i", str(tiny), "-o", str(out), "--recipe", "fast", "--no-check", "--threads", "1"]
    arguments += ["--extra_options", "num_hidden_layers=2"]
    assert main([*arguments, "--target-size", "2.3MB"]) == 0
    assert 2.0e6 < size(out) <= 2.35e6
    info = json.loads((out / "ortlm.json").read_text(encoding="utf-8"))["info"]
    assert len(info["frontier"]) >= 5
    assert "chosen" in capsys.readouterr().err


def test_bits_per_weight(tiny: Path, tmp_path: Path) -> None:
    allocation = search(BuildRequest(tiny, options=FAST), tmp_path / "out", target_bits=6.5, threads=1)
    outline = prepare(allocation.request).outline
    assert 6.3 < outline.bits_per_weight <= 6.5
    smaller = [point for point in allocation.frontier if point.bytes < allocation.chosen.bytes]
    assert all(point.kld >= allocation.chosen.kld for point in smaller)


def test_fewer_bits_than_usual(tiny: Path, tmp_path: Path) -> None:
    """Below 4 bits per weight there are matrices of 2 and 3, and those lose most that have the fewest."""
    allocation = search(BuildRequest(tiny, options=FAST), tmp_path / "out", target_bits=3.8, threads=1)
    assert min(allocation.chosen.bits.values()) in (2, 3)
    assert prepare(allocation.request).outline.bits_per_weight <= 3.8
    kld = [point.kld for point in allocation.frontier]
    assert kld == sorted(kld, reverse=True)
    wanted = allocation.chosen.kld
    again = search(BuildRequest(tiny, options=FAST), tmp_path / "out", target_kld=wanted, threads=1)
    assert again.chosen.kld <= wanted
    assert again.chosen.bytes <= allocation.chosen.bytes


def test_never_behind_what_needs_no_search(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size of a recipe, or of as many bits for all, the search is at least as near."""
    rules = (Rule(bits=5), Rule(roles=("down",), bits=6))
    recipe = BuildRequest(tiny, options=replace(FAST, rules=rules))
    plain = [Point(bits, 0, 0.0).name for bits in _Matrices(recipe).plain()]
    assert plain == ["10 at 4 bits", "10 at 5 bits", "10 at 6 bits", "2 at 6 bits, 8 at 5"]
    limit = prepare(recipe).outline.bits_per_weight
    measured: list[Point] = []
    point = _Builds.point

    def watched(self: _Builds, bits: Any) -> Point:
        measured.append(point(self, bits))
        return measured[-1]

    monkeypatch.setattr(_Builds, "point", watched)
    allocation = search(recipe, tmp_path / "out", target_bits=limit + 0.001, threads=1)
    # Of the four, three are small enough, and each was measured, once.
    known = {point.name: point.kld for point in measured}
    assert all(known[name] >= allocation.chosen.kld for name in plain if name != plain[2])
    assert len({frozenset(point.bits.items()) for point in measured}) == len(measured)
    assert allocation.frontier == tuple(sorted(allocation.frontier, key=lambda point: -point.kld))


def test_matrices_of_neighbors_are_measured_together() -> None:
    kinds = ("attn/qkv", "mlp/down")
    levels = {f"/model/layers.{i}/{kind}": [4, 8] for i in range(40) for kind in kinds} | {"/lm_head": [4, 8]}
    groups = _groups(levels)
    assert sorted(node for group in groups for node in group) == sorted(levels)
    assert len(groups) <= 34
    for single in ("/model/layers.0/attn/qkv", "/model/layers.39/mlp/down", "/lm_head"):
        assert (single,) in groups
    assert tuple(f"/model/layers.{i}/attn/qkv" for i in (1, 2, 3)) in groups
    few = {node: its for node, its in levels.items() if "/layers.1" in node}
    assert [len(group) for group in _groups(few)] == [1] * len(few)


def test_a_tied_head_is_searched(saved: Any, tmp_path: Path) -> None:
    """One matrix serves as embeddings and head: it is the head's, and what a lookup cannot have it cannot."""
    request = BuildRequest(saved("qwen2-tied").folder, options=FAST)
    allocation = search(request, tmp_path / "out", target_kld=0.05, threads=1)
    assert "/lm_head/MatMul" in allocation.chosen.bits
    assert "/model/embed_tokens/Gather" not in allocation.chosen.bits


@pytest.mark.parametrize("target", ["cuda", "webgpu", "mobile"])
def test_for_devices_that_are_not_here(tiny: Path, tmp_path: Path, target: str) -> None:
    """The processor measures, and matrices have the bits that the target has kernels for."""
    request = BuildRequest(tiny, target=target, options=replace(FAST, layers=1))
    allocation = search(request, tmp_path / "out", target_bits=7, threads=1)
    assert {bits for point in allocation.frontier for bits in point.bits.values()} == {4, 8}
    assert allocation.frontier[-1].kld < 0.01


def test_names_of_mixtures() -> None:
    assert Point({"a": 6, "b": 8, "c": 6, "d": 5}, 1, 0.0).name == "1 at 8 bits, 2 at 6, 1 at 5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bits", "5", "--target-kld", "0.1"], "--target-kld and --target-bits are different aims"),
        (["--target-bits", "0"], "--target-bits must be above 0, and at most 32; got 0.0"),
        (["--target-bits", "5", "--keep-quantization"], "--keep-quantization and --target-bits contradict"),
        (["--target-bits", "5", "--layout", "transformers.js", "-p", "q4"], "--target-bits does not apply"),
    ],
)
def test_aims_that_contradict(tiny: Path, tmp_path: Path, capsys, options, message) -> None:
    assert main(["build", "-i", str(tiny), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_recipe_with_blocks_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """The mixture reads each matrix as the build has it that it comes from."""
    options = BuildOptions(recipe="balanced", calibration_tokens=256, layers=2)
    allocation = search(BuildRequest(tiny, options=options), tmp_path / "out", target_kld=0.01, threads=1)
    assert max(p.kld for p in allocation.frontier) < 0.2
    assert allocation.frontier[-1].kld < 0.002


def test_experts_are_one_choice(saved: Any, tmp_path: Path) -> None:
    """A choice each for q, k and v, out, and the experts of two layers, and one each for head and embeddings."""
    allocation = search(
        BuildRequest(saved("mixtral").folder, options=FAST), tmp_path / "out", target_kld=0.02, threads=1
    )
    assert len(allocation.frontier[-1].bits) == 8
    assert allocation.frontier[-1].bits["/model/layers.1/moe/QMoE"] == 8
    assert all(point.bits["/model/layers.1/moe/QMoE"] in (4, 8) for point in allocation.frontier)
    kld = [point.kld for point in allocation.frontier]
    assert kld[0] > 10 * kld[-1]


def test_what_cannot_be_reached(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="with the fewest bits in every matrix the model takes"):
        search(BuildRequest(tiny, options=FAST), tmp_path / "out", target_size=1_000_000, threads=1)
    with pytest.raises(BadOption, match="with 8 bits everywhere the mean KL divergence is"):
        search(BuildRequest(tiny, options=FAST), tmp_path / "out", target_kld=1e-7, threads=1)
    with pytest.raises(BadOption, match=r"--target-bits 2 cannot be reached.* per weight"):
        search(BuildRequest(tiny, options=FAST), tmp_path / "out", target_bits=2, threads=1)
    with pytest.raises(BadOption, match="shape int4; got -p fp32"):
        search(BuildRequest(tiny, precision="fp32"), tmp_path / "out", target_kld=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("2.1GB", 2_100_000_000), ("700 mb", 700_000_000), ("1KiB", 1024)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text, "--target-size") == count


def test_no_size() -> None:
    with pytest.raises(BadOption, match=r"such as 2\.1GB or 700MB; got 'big'"):
        parse_bytes("big", "--target-size")
