"""Recipes from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortlm.builder.options import BuildOptions, make_recipe
from ortlm.errors import BadOption
from ortlm.quant.recipe import MatrixLocation
from ortlm.quant.recipe_file import find_preset
from ortlm.target import find_target

RECIPE = """\
base: quality
algorithm: awq_gptq
block: 64
embed_bits: 4
rules:
  - {roles: gate_up, layers: [0, -1], bits: 8}
  - {nodes: "*/layers.3/attn/*", algorithm: rtn}
  - {roles: [down], layers: sensitive, bits: 0}
calibration: {tokens: 4096, damping: 0.02}
"""


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    preset = find_preset(str(path))
    assert (preset.name, preset.calibration.tokens, preset.calibration.length) == ("mine", 4096, 128)
    recipe = make_recipe("int4", find_target("cpu"), BuildOptions(recipe=str(path)))

    def at(role: str, layer: int | None = None, node: str = "/n") -> str:
        return str(recipe(MatrixLocation(role, node, layer, 16)))

    assert at("gate_up", 15) == "int8, block 64, asymmetric, awq_gptq"
    assert at("gate_up", 5) == "int6, block 64, asymmetric, awq_gptq"
    assert at("qkv", 3, "/model/layers.3/attn/qkv_proj/MatMul").endswith("rtn")
    assert at("embed") == "int4, block 64, asymmetric, rtn"
    assert (at("down", 0), at("down", 3)) == ("None", "int8, block 64, asymmetric, awq_gptq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "must hold keys and values"),
        ("bits: true", "bits is True"),
        ("bitz: 4", "there is no key 'bitz'.*Did you mean: bits"),
        ("bits: 7", "bits must be one of 2, 3, 4, 5, 6, 8"),
        ("block: 48", "Nearest: 32|Nearest: 64"),
        ("base: best", "there are fast, balanced, quality"),
        ("algorithm: hqq", "there is no quantization algorithm 'hqq'"),
        ("rules: [{roles: head}]", r"rules\[0\] changes nothing"),
        ("rules: [{roles: heads, bits: 4}]", r"rules\[0\]: there is no role 'heads'"),
        ("rules: [{layers: middle, bits: 4}]", "layers must be a list of numbers or 'sensitive'"),
        ("calibration: {tokens: 8}", "at least one row"),
        ("calibration: {damping: 0}", "damping must be above 0"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadOption, match=message):
        find_preset(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "an alias"),
        ("[" * 5000 + "]" * 5000, "more than 20 levels"),
        ("a: " * 3 + "\n" + "- " * 3000 + "1", "recipe"),
        ("bits: " + "1" * 6000, "recipe"),
        ("#" + "x" * 300_000, "more than 262,144 bytes"),
        ("!!python/object/apply:os.system [x]", "cannot be read as YAML"),
        ("bits: .inf", "bits is inf"),
        ("when: 2020-99-99", "cannot be read as YAML"),
    ],
    ids=["alias", "deep", "nested", "long number", "large", "python", "infinite", "date"],
)
def test_hostile_recipes_are_refused_in_a_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(BadOption, match=message) as caught:
        find_preset(str(path))
    assert "\n" not in str(caught.value)
