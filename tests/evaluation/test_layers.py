"""What goes through the layers, against hooks in transformers; and how much noise there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact, BadOption
from ortlm.evaluation.layers import LayerNoise, observe_artifact, tapped_graph
from ortlm.evaluation.sources import ArtifactSource
from tests.runtime.conftest import build_official

TOKENS = np.random.default_rng(0).integers(7, 270, (2, 40)).tolist()


def taken(artifact: ortlm.Artifact) -> dict[tuple[int, int], np.ndarray]:
    found = {}

    def observe(layer: int, chunk: int, states: np.ndarray) -> None:
        found[layer, chunk] = states

    observe_artifact(artifact, TOKENS, observe, threads=1)
    return found


def hooked(model: Any, tokens: list[int]) -> list[np.ndarray]:
    """Return the inputs of each layer's first attention projection, and of the head, by transformers."""
    found: list[np.ndarray] = []
    modules = []
    for layer in model.model.layers:
        attention = layer.self_attn
        modules.append(attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj)
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(np.asarray(args[0][0].detach())))
        for module in (*modules, model.lm_head)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


# A fused projection; one of its own with a Gemm as head; scaled logits; a stream without a norm before attention.
@pytest.mark.parametrize("name", ["phi3", "qwen2-tied", "granite", "olmo2", "gemma3", "gemma4-e", "gemma3n"])
def test_states_are_those_of_transformers(name: str, saved: Any, build: Any) -> None:
    found = taken(build(name).artifact)
    for chunk, tokens in enumerate(TOKENS):
        wanted = hooked(saved(name).model, tokens)
        assert [key for key in sorted(found) if key[1] == chunk] == [(i, chunk) for i in range(len(wanted))]
        for layer, states in enumerate(wanted):
            assert found[layer, chunk].shape == states.shape
            error = np.abs(found[layer, chunk] - states).max() / np.abs(states).max()
            assert error < 1e-4, (layer, chunk)


@pytest.mark.parametrize("fast_prompts", [False, True])
def test_texts_in_several_pieces(fast_prompts: bool, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are of different lengths, and those of integer matmuls as short as answers are."""
    whole = taken(build("phi3", "int4", BuildOptions(recipe="fast")).artifact)
    monkeypatch.setattr("ortlm.evaluation.layers.CHUNK_TOKENS", 32)
    found = taken(build("phi3", "int4", BuildOptions(recipe="fast", fast_prompts=fast_prompts)).artifact)
    assert found.keys() == whole.keys()
    for key, states in found.items():
        assert np.abs(states - whole[key]).max() / np.abs(whole[key]).max() < 0.02


@pytest.mark.slow
def test_artifacts_of_the_official_builder(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, model = build_official(tmp_path_factory.getbasetemp())
    before = sorted(path.name for path in folder.iterdir())
    found = taken(ortlm.open_artifact(folder))
    for layer, states in enumerate(hooked(model, TOKENS[1])):
        np.testing.assert_allclose(found[layer, 1], states, rtol=1e-3, atol=1e-3 * np.abs(states).max())
    assert sorted(path.name for path in folder.iterdir()) == before


def test_graphs_that_are_fed_token_by_token(builds: Callable[[str], Path], tmp_path: Path) -> None:
    """Without ortlm.json nothing says that all logits can be had."""
    for path in builds("fp32").iterdir():
        if path.name != "ortlm.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    wanted = taken(ortlm.open_artifact(builds("fp32")))
    for key, states in taken(ortlm.open_artifact(tmp_path)).items():
        np.testing.assert_allclose(states, wanted[key], atol=1e-4 * np.abs(wanted[key]).max())


def test_noise_is_that_of_its_definition() -> None:
    random = np.random.default_rng(0)
    ref, q = (random.normal(size=(2, 10, 8)).astype(np.float32) for _ in range(2))
    noise = LayerNoise()
    for chunk in range(2):
        noise.reference(0, chunk, ref[chunk])
        noise.reference(1, chunk, ref[chunk])
    noise.reference(0, 2, ref[0])
    for chunk in range(2):
        noise.model(0, chunk, q[chunk])
        noise.model(1, chunk, ref[chunk])
    first, second = noise.decibels()
    assert first == pytest.approx(10 * np.log10((ref**2).sum() / ((ref - q) ** 2).sum()), rel=1e-5)
    assert second is None


def test_other_models_and_other_names(builds: Callable[[str], Path], tmp_path: Path) -> None:
    noise = LayerNoise()
    with pytest.raises(BadOption, match="Leave --layers out"):
        ArtifactSource(builds("fp32"), 1).open([np.arange(9)], noise.model)
    path = builds("fp32") / "model.onnx"
    assert tapped_graph(path)[1] == [f"tap.{i}" for i in range(5)]
    model = ir.load(path)
    for node in model.graph:
        node.name = f"other{node.name}"
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(BadArtifact, match="Evaluate without --layers"):
        tapped_graph(tmp_path / "model.onnx")
