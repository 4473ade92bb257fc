"""config.json and generation_config.json of a checkpoint: any values give an architecture or an error of ortlm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ortlm import architectures
from ortlm._utils.checked_json import parse_object
from ortlm.artifact.generation_config import not_obeyed, read_generation
from ortlm.errors import BadCheckpoint
from tests.architectures import families
from tests.fuzz.harness import damaged_json, fuzz

CONFIGS = {
    p.stem: json.loads(p.read_text()) for p in (Path(__file__).parents[1] / "architectures/configs").glob("*")
}
CONFIGS |= {
    "phi-3.5-vision": json.loads((Path(__file__).parents[1] / "vision/phi-3.5-vision.json").read_text()),
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
}
CONFIGS |= {
    name: json.loads(families.FAMILIES[name]().to_json_string())
    for name in ("llama-yarn", "gemma3", "mistral", "qwen2-moe", "gpt-oss")
}
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 50,
    "bad_words_ids": [[1, 2], [3]],
    "suppress_tokens": [1],
    "sequence_bias": [[[1, 2], -1.5]],
    "no_repeat_ngram_size": 3,
    "min_length": 2,
    "num_beams": 2,
}


@pytest.mark.parametrize(
    "name",
    [
        "phi-3.5-mini",
        "gemma-3-1b",
        "llama-3.2-1b",
        "llama-yarn",
        "mistral",
        "phi-3.5-vision",
        "phi-3.5-moe",
        "qwen2-moe",
        "gpt-oss",
    ],
)
def test_config(name, request):
    @fuzz(damaged_json(CONFIGS[name]))
    def door(found):
        # As a file says it: a number beyond 64 bits is a float.
        text = json.dumps(found)
        architectures.describe(parse_object(text, where="config.json", error=BadCheckpoint))

    door()


@fuzz(damaged_json(CONFIGS["smollm-1.7b"]))
def test_values_that_no_file_holds(found):
    architectures.describe(found)


@fuzz(damaged_json(GENERATION))
def test_generation(found):
    not_obeyed(found)
    read_generation(found, file="generation_config.json", error=BadCheckpoint)
