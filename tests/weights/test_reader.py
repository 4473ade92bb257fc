"""Tensors with other prefixes: saved from a class without a head, or cut out of a larger model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import ortlm
from ortlm.checkpoint.reader import open_checkpoint
from ortlm.errors import BadCheckpoint
from ortlm.weights.lora import open_adapter
from ortlm.weights.resolution import stored_architecture
from tests import lora
from tests.architectures import families, oracle
from tests.vision import gemma3

TIED = ["qwen3", "qwen2-tied", "llama3", "gemma", "gemma2", "gemma3", "granite", "smollm3", "phi4-mini"]
UNTIED = ["llama", "mistral", "phi-2", "phi3", "olmo2", "qwen2"]


def moved(folder: Path, out: Path, prefix: str, *, head: str | None = None, classes: list[str]) -> Path:
    """Copy a checkpoint with ``prefix`` in place of "model." and ``head`` in place of "lm_head."."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")

    def name_of(tensor: str) -> str:
        if tensor.startswith("model."):
            return prefix + tensor.removeprefix("model.")
        return tensor.replace("lm_head.", head or "lm_head.")

    changed = {name_of(tensor): value for tensor, value in tensors.items()}
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "architectures": classes}))
    return out


@pytest.mark.parametrize("name", TIED)
def test_tied_models_without_a_head_are_what_transformers_loads(
    name: str, saved: Any, tmp_path: Path
) -> None:
    source = saved(name).folder
    body = AutoModel.from_pretrained(source)
    body.save_pretrained(tmp_path / "headless")
    families.save_tokenizer(tmp_path / "headless")
    assert not any(k.startswith("model.") for k in load_file(tmp_path / "headless" / "model.safetensors"))
    want = oracle.prompt_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "headless").eval(), PROMPT)
    ortlm.build(tmp_path / "headless", tmp_path / "out", precision="fp32")
    assert oracle.relative_error(ortlm.load(tmp_path / "out", threads=1).logits(PROMPT), want) < 1e-4


PROMPT = oracle.random_tokens(40)


@pytest.mark.parametrize("classes", [["Qwen3Model"], ["Qwen3ForCausalLM"], []], ids=str)
def test_the_class_that_is_named_does_not_matter(classes: list[str], saved: Any, tmp_path: Path) -> None:
    folder = moved(saved("qwen3").folder, tmp_path / "checkpoint", "", classes=classes)
    found = stored_architecture(open_checkpoint(folder))
    assert found.decoder == stored_architecture(open_checkpoint(saved("qwen3").folder)).decoder


@pytest.mark.parametrize("name", UNTIED)
def test_an_untied_model_without_a_head_is_refused_by_name(name: str, saved: Any, tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(saved(name).folder)
    body.save_pretrained(tmp_path / "headless")
    families.save_tokenizer(tmp_path / "headless")
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight.*class without a head"):
        ortlm.build(tmp_path / "headless", tmp_path / "out", precision="fp32")


@pytest.mark.parametrize("name", ["llama", "phi-2", "phi3", "qwen3", "gemma2"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model.", ""])
def test_prefixes_of_larger_models(name: str, prefix: str, saved: Any, tmp_path: Path) -> None:
    head = "language_model.lm_head." if prefix.startswith("language") else None
    folder = moved(saved(name).folder, tmp_path / "checkpoint", prefix, head=head, classes=[])
    ortlm.build(folder, tmp_path / "out", precision="fp32")
    got = ortlm.load(tmp_path / "out", threads=1).logits(PROMPT)
    assert oracle.relative_error(got, oracle.prompt_logits(saved(name).model, PROMPT)) < 1e-4


def test_a_tensor_under_two_names_is_refused(saved: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("qwen3").folder, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"'norm\.weight'"):
        stored_architecture(open_checkpoint(folder))


@pytest.mark.parametrize("trained_on", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("built", ["causal", "headless"])
def test_an_adapter_fits_whichever_class_it_was_trained_on(
    trained_on: Any, built: str, saved: Any, tmp_path: Path
) -> None:
    folders = {"causal": saved("qwen3").folder, "headless": tmp_path / "headless"}
    AutoModel.from_pretrained(folders["causal"]).save_pretrained(folders["headless"])
    lora.save(trained_on.from_pretrained(folders["causal"]), tmp_path / "adapter", target_modules=["q_proj"])
    checkpoint = open_checkpoint(folders[built])
    found = open_adapter(tmp_path / "adapter", checkpoint, stored_architecture(checkpoint))
    assert sorted(found.deltas) == ["layers.0.q.weight", "layers.1.q.weight"]


def test_a_gemma3_with_images_without_a_head(tmp_path: Path) -> None:
    model = gemma3.save(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "headless")
    path = tmp_path / "headless" / "model.safetensors"
    tensors = load_file(path)
    bare = {k.replace("language_model.model.", "language_model."): v for k, v in tensors.items()}
    if bare.keys() != tensors.keys():
        save_file(bare, path)
    found = stored_architecture(open_checkpoint(tmp_path / "headless"))
    assert found.decoder == stored_architecture(open_checkpoint(tmp_path / "whole")).decoder
