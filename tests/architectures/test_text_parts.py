"""Text decoders of multimodal models, against transformers' whole models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma4Config,
    Ministral3Config,
    Mistral3Config,
    MistralConfig,
    Phi4MultimodalConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
)

import ortlm
from ortlm import architectures
from ortlm.errors import UnsupportedModel
from tests import official
from tests.architectures import families, oracle
from tests.graph.test_parity import ENDS, STEPS, TOLERANCE, greedy


def mistral3(text: Any) -> Any:
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 16,
    }  # fmt: skip
    return Mistral3Config(vision_config=vision, text_config=text.to_dict(), tie_word_embeddings=False)


def qwen3_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = families.sizes(head_dim=32, rope_parameters=rope)
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def phi4() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_token_id": 280,
    }  # fmt: skip
    audio = {
        "hidden_size": 32, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
        "audio_token_id": 281,
    }  # fmt: skip
    return Phi4MultimodalConfig(
        **families.sizes(original_max_position_embeddings=64, rope_parameters=families.longrope(8)),
        vision_config=vision,
        audio_config=audio,
    )


def gemma4(name: str = "gemma4") -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    return Gemma4Config(
        text_config=families.FAMILIES[name]().to_dict(), vision_config=vision, audio_config=None
    )


def qwen3_5() -> Any:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    return Qwen3_5Config(text_config=families.qwen3_5().to_dict(), vision_config=vision)


def qwen3_5_moe() -> Any:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    text = families.FAMILIES["qwen3.5-moe"]().to_dict()
    return Qwen3_5MoeConfig(text_config=text, vision_config=vision)


MODELS: dict[str, Callable[[], Any]] = {
    "mistral3": lambda: mistral3(MistralConfig(**families.sizes(head_dim=16, sliding_window=None))),
    "mistral3-ministral3": lambda: mistral3(
        Ministral3Config(
            **families.sizes(head_dim=16, rope_parameters=families.yarn(llama_4_scaling_beta=0.5))
        )
    ),
    "gemma4": gemma4,
    "gemma4-e": lambda: gemma4("gemma4-e"),
    "qwen3-vl": qwen3_vl,
    "qwen3.5": qwen3_5,
    "qwen3.5-moe": qwen3_5_moe,
    "phi4-multimodal": phi4,
    "phi4mm": phi4,
}


def save(name: str, folder: Path) -> Any:
    """Write a tiny model of ``name`` into ``folder`` and return it."""
    config = MODELS[name]()
    maker = AutoModelForCausalLM if name.startswith("phi4") else AutoModelForImageTextToText
    model = maker.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    families.randomize(model, seed=0)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    families.save_tokenizer(folder)
    if name == "phi4mm":
        as_published(folder)
    return model


def as_published(folder: Path) -> None:
    """Give a Phi-4-multimodal the names of its publisher's files, with adapters next to each matrix."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    rope.pop("partial_rotary_factor", None)
    config |= {"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"], "rope_theta": theta}
    config |= {"rope_scaling": rope | {"type": "longrope"}, "embd_layer": {"embedding_cls": "image_audio"}}
    path.write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, value in tensors.items():
        if "_proj.weight" in name and name.startswith("model.layers."):
            module = name.removesuffix(".weight")
            found[f"{module}.base_layer.weight"] = value
            found[f"{module}.lora_A.vision.weight"] = torch.ones(4, value.shape[1])
            found[f"{module}.lora_B.speech.weight"] = torch.ones(value.shape[0], 4)
        else:
            found[name] = value
    save_file(found, folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_text_decoder(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "in")
    built = ortlm.build(tmp_path / "in", tmp_path / "out", precision="fp32")
    lm = ortlm.load(built.path, threads=1)
    tokens = oracle.random_tokens(60)
    want = oracle.prompt_logits(model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < TOLERANCE
    stepped = lm.logits_batch([tokens[:24], tokens[:9]], [tokens[24:40], tokens[9:25]])
    assert oracle.relative_error(stepped[0], want[23:40]) < TOLERANCE
    assert oracle.relative_error(stepped[1], want[8:25]) < TOLERANCE
    # Past a change of the rotation.
    longer = oracle.random_tokens(100)
    assert oracle.relative_error(lm.logits(longer), oracle.prompt_logits(model, longer)) < TOLERANCE
    # Where the rotation changes, transformers' class of this family loses what came before.
    steps = STEPS if lm.manifest.rope_switch_tokens is None else lm.manifest.rope_switch_tokens - 24
    answer = oracle.greedy(model, tokens[:24], steps=steps)
    assert greedy(lm, tokens[:24], steps=steps) == answer
    until = next((i for i, token in enumerate(answer) if token in ENDS), steps)
    assert official.greedy(built.path, tokens[:24], steps=until) == answer[:until]


# Random weights of Qwen3.5 make much of small errors, and its decoder is among those of test_parity.
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("qwen3.5")])
def test_quantized(name: str, precision: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "in")
    built = ortlm.build(tmp_path / "in", tmp_path / "out", precision=precision)
    tokens = oracle.random_tokens(24)
    got = ortlm.load(built.path, threads=1).logits(tokens)
    most = 0.12 if precision == "int8" else 0.8
    assert oracle.relative_error(got, oracle.prompt_logits(model, tokens)) < most


@pytest.mark.parametrize("name", MODELS)
def test_the_build_says_what_it_leaves_out(name: str, tmp_path: Path) -> None:
    config = json.loads(MODELS[name]().to_json_string())
    assert any("text decoder" in note for note in architectures.describe(config).notes)


def test_gemma3n_as_it_is_published(tmp_path: Path) -> None:
    """With encoders of images and audio, the old keys of rotation, and maps that sharing layers do not use.

    transformers needs another package to make such a model.
    """
    model = families.save("gemma3n", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    text = families.old_keys(json.loads(path.read_text()))
    text |= {"query_pre_attn_scalar": 256, "altup_lr_multiplier": 1.0}
    path.write_text(
        json.dumps(
            {
                "model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": text,
                "vision_config": {"model_type": "gemma3n_vision"}, "audio_config": {"model_type": "gemma3n_audio"},
                "audio_soft_tokens_per_image": 188, "vision_soft_tokens_per_image": 256, "audio_token_id": 281,
                "image_token_id": 282, "boi_token_id": 283, "eoi_token_id": 284, "boa_token_id": 285,
                "eoa_token_id": 286, "eos_token_id": [2], "initializer_range": 0.02,
            }
        )
    )  # fmt: skip
    file = tmp_path / "in" / "model.safetensors"
    found = {f"model.language_{name}": value for name, value in load_file(file).items()}
    for name in ("vision_tower.a", "audio_tower.b", "embed_vision.c", "embed_audio.d"):
        found[f"model.{name}.weight"] = torch.ones(3)
    for part, rows in (("k_proj", 32), ("v_proj", 32)):
        found[f"model.language_model.layers.4.self_attn.{part}.weight"] = torch.ones(rows, 64)
    found["model.language_model.layers.4.self_attn.k_norm.weight"] = torch.ones(16)
    save_file(
        {name.replace("language_model.model.", "language_model."): v for name, v in found.items()}, file
    )
    built = ortlm.build(tmp_path / "in", tmp_path / "out", precision="fp32")
    tokens = oracle.random_tokens(60)
    want = oracle.prompt_logits(model, tokens)
    assert oracle.relative_error(ortlm.load(built.path, threads=1).logits(tokens), want) < TOLERANCE


def test_a_stop_token_of_the_text_part_alone(tmp_path: Path) -> None:
    save("mistral3", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("eos_token_id", None)
    config["text_config"]["eos_token_id"] = [77, 78]
    path.write_text(json.dumps(config))
    built = ortlm.build(tmp_path, tmp_path / "out", precision="int4")
    assert {77, 78} <= set(built.manifest.stop_token_ids)


def test_experts_in_one_tensor_or_apart(tmp_path: Path) -> None:
    """Both are published: gate and up of all experts of a layer together, or a matrix for each."""
    families.save("qwen3.5-moe", tmp_path / "apart")
    shutil.copytree(tmp_path / "apart", tmp_path / "one")
    tensors = load_file(tmp_path / "apart" / "model.safetensors")
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    assert len(found) < len(tensors)
    for i in range(4):
        at = f"model.layers.{i}.mlp.experts"
        parts = [
            torch.cat([tensors[f"{at}.{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in range(4)
        ]
        found[f"{at}.gate_up_proj"] = torch.stack(parts)
        found[f"{at}.down_proj"] = torch.stack([tensors[f"{at}.{e}.down_proj.weight"] for e in range(4)])
    save_file(found, tmp_path / "one" / "model.safetensors")
    tokens = oracle.random_tokens(12)
    logits = []
    for name in ("apart", "one"):
        built = ortlm.build(tmp_path / name, tmp_path / f"{name}-built", precision="fp32")
        logits.append(ortlm.load(built.path, threads=1).logits(tokens))
    np.testing.assert_array_equal(*logits)


def test_phi_3_small_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"phi3small.*block-sparse"):
        architectures.describe({"model_type": "phi3small"})
