"""Recipes in YAML and lines of calibration files: any bytes give a value or an error of ortlm."""

from __future__ import annotations

import json

import yaml

from ortlm.builder.options import BuildOptions, make_recipe
from ortlm.calibration.dataset import Reader, read_rows
from ortlm.quant.recipe_file import find_preset
from ortlm.target import TARGETS
from tests.architectures import families
from tests.fuzz.harness import damaged_bytes, damaged_json, fuzz

RECIPE = {
    "base": "fast",
    "algorithm": "gptq",
    "bits": 4,
    "block": 32,
    "symmetric": True,
    "head_bits": 8,
    "embed_bits": 4,
    "wide": True,
    "rotate": False,
    "calibration": {"tokens": 4096, "length": 256, "damping": 0.01, "seed": 1},
    "rules": [
        {"roles": ["qkv"], "layers": [0, 1], "bits": 8},
        {"nodes": "*down*", "block": 64, "at_most": 3},
    ],
}
LINES = [
    {"text": "a b"},
    {"messages": [{"role": "user", "content": "x"}]},
    {"tokens": [1, 2]},
    "text",
    [3, 4],
]


def use(path):
    preset = find_preset(str(path))
    make_recipe("int4", TARGETS["cpu"], BuildOptions(recipe=str(path)))
    preset.calibration.of(10_000_000, 4096)


@fuzz(damaged_bytes(yaml.safe_dump(RECIPE).encode()))
def test_recipe_of_any_bytes(tmp_path, raw):
    (tmp_path / "recipe.yaml").write_bytes(raw)
    use(tmp_path / "recipe.yaml")


@fuzz(damaged_json(RECIPE))
def test_recipe_of_any_values(tmp_path, found):
    (tmp_path / "recipe.yaml").write_text(json.dumps(found))
    use(tmp_path / "recipe.yaml")


@fuzz(damaged_json(LINES))
def test_calibration_lines(tmp_path, found):
    families.save_tokenizer(tmp_path)
    reader = Reader.open(tmp_path, families.VOCAB)
    lines = found if isinstance(found, list) else [found]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    read_rows(tmp_path / "x.jsonl", reader, count=2, length=4)
