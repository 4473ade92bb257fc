"""Graphs that are run part by part."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadOption
from ortlm.evaluation.in_parts import PartsSource, parts_of
from ortlm.evaluation.sources import ArtifactSource

Build = Callable[..., ortlm.LanguageModel]
CHUNKS = [np.arange(3, 23), np.arange(40, 20, -1)]


# A router's near ties fall either way where weights are rounded.
FAMILIES = [
    ("phimoe", "fp32"),
    ("gpt-oss", "fp32"),
    ("phi3-longrope", "int4"),
    ("gemma3", "int4"),
    ("gemma3n", "int4"),
    ("qwen3.5", "int4"),
]


@pytest.mark.parametrize(("family", "precision"), FAMILIES)
def test_parts_compute_what_the_whole_computes(build: Build, family: str, precision: str) -> None:
    artifact = build(family, precision).artifact
    whole = ArtifactSource(artifact.path, 1, "cpu")
    whole.open(CHUNKS)
    expected = np.stack([whole.logits(number) for number in range(2)])
    parts = PartsSource(artifact, 1, part_bytes=50_000)
    parts.open(CHUNKS)
    found = np.stack([parts.logits(number) for number in range(2)])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_part_has_few_weights(build: Build) -> None:
    path = build("llama").artifact.graph_path("decoder")
    fed = ["input_ids", "attention_mask", "num_logits_to_keep"]
    counts = [len(parts_of(path, fed, ["logits"], size)) for size in (1, 20_000, 1 << 30)]
    assert counts[0] > counts[1] > counts[2] == 1
    for part in parts_of(path, fed, ["logits"], 1):
        assert len(part.outputs) >= 1
    assert parts_of(path, fed, ["logits"], 1)[-1].outputs == ("logits",)


def test_what_cannot_be_cut_is_refused(build: Build) -> None:
    with pytest.raises(BadOption, match="other weights for prompts"):
        PartsSource(build("llama", "int4", BuildOptions(fast_prompts=True, algorithm="rtn")).artifact)
