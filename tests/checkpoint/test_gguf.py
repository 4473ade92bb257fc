"""GGUF files read as the checkpoints they were made from: what the model is, its weights, its tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    Olmo3Config,
    Qwen2MoeConfig,
    Starcoder2Config,
)

import ortlm
from ortlm.architectures import gguf_forms
from ortlm.builder.options import BuildOptions
from ortlm.checkpoint.gguf import open_gguf
from ortlm.checkpoint.gguf_weights import READ, BlockWeight
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.checkpoint.quantized_weight import Grid
from ortlm.checkpoint.reader import Checkpoint, open_checkpoint
from ortlm.spec import Architecture, Attention
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture
from tests.architectures import families, oracle
from tests.checkpoint import gguf_files

# What a GGUF file cannot say of these: windows of some layers, a scale of scores of its own, whether weights of
# experts sum to one, which layers have none, and what they are clamped to; biases of Cohere and of
# convolutions, and a base of the rotation for layers with a window.
LEFT_OUT = {
    "mistral", "qwen2-tied", "gemma2", "gemma3", "gemma3-old", "phi3-longrope-old", "llama3-old",
    "mixtral-window", "qwen2-moe", "qwen2-moe-window", "qwen3-moe-plain", "gpt-oss", "phimoe", "phimoe-old",
    "starcoder2", "cohere-bias", "olmo3", "olmo3-old", "lfm2",
}  # fmt: skip


def olmo3() -> Olmo3Config:
    ropes = {"full_attention": families.yarn(rope_theta=5e5), "sliding_attention": {"rope_theta": 5e5}}
    return Olmo3Config(**families.sizes(num_hidden_layers=4, sliding_window=8, rope_parameters=ropes))


def lfm2() -> Lfm2Config:
    config = families.lfm2()
    config.conv_bias = False
    return config


def gpt_oss() -> GptOssConfig:
    config = families.gpt_oss()
    config.swiglu_limit = 7.0
    return config


MORE = {
    "gemma2-as-published": lambda: Gemma2Config(
        **families.sizes(
            num_hidden_layers=3,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=6.0,
        )
    ),
    "gemma3-as-published": lambda: Gemma3TextConfig(
        **families.sizes(num_hidden_layers=4, head_dim=32, query_pre_attn_scalar=32, sliding_window=8),
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "qwen2-moe-as-published": lambda: Qwen2MoeConfig(
        **families.sizes(
            num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
        )
    ),
    "gpt-oss-as-published": gpt_oss,
    "starcoder2-whole": lambda: Starcoder2Config(**families.sizes(sliding_window=None)),
    "olmo3-as-published": olmo3,
    "lfm2-as-published": lfm2,
}
ROWS = [
    name
    for name, make in families.FAMILIES.items()
    if name not in LEFT_OUT and make().model_type in gguf_files.NAMES
] + list(MORE)
MIXTURES = [name for name in ROWS if "moe" in name or name.startswith(("mixtral", "gpt-oss"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for checkpoints, with more families to make."""
    monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, **MORE})
    return tmp_path


def read(checkpoint: Checkpoint) -> tuple[Architecture, Weights]:
    architecture = stored_architecture(checkpoint)
    return architecture, Weights(checkpoint, architecture)


def near(one: Architecture, other: Architecture) -> None:
    """Check that two architectures say the same, frequencies but for rounding."""
    for a, b in zip(one.decoder.layers, other.decoder.layers, strict=True):
        for ropes in ((getattr(a.mixer, "rope", None), getattr(b.mixer, "rope", None)),):
            if ropes[0] is None or ropes[1] is None:
                assert ropes[0] == ropes[1]
                continue
            np.testing.assert_allclose(ropes[0].inv_freq, ropes[1].inv_freq, rtol=3e-7)
            assert ropes[0].factor == pytest.approx(ropes[1].factor, rel=1e-6)
            if ropes[1].long_inv_freq is not None and ropes[1].long_inv_freq != ropes[1].inv_freq:
                np.testing.assert_allclose(ropes[0].long_inv_freq, ropes[1].long_inv_freq, rtol=3e-7)
                assert ropes[0].switch_tokens == ropes[1].switch_tokens

    def bare(found: Architecture) -> Any:
        layers = tuple(
            replace(y, mixer=replace(y.mixer, rope=None)) if isinstance(y.mixer, Attention) else y
            for y in found.decoder.layers
        )
        return replace(found.decoder, layers=layers)

    assert bare(one) == bare(other)


@pytest.mark.parametrize("name", ROWS)
def test_a_family_is_what_it_was_converted_from(name: str, folder: Path) -> None:
    families.save(name, folder)
    gguf_files.write(folder, folder / "model.gguf")
    ours, held = read(open_gguf(folder / "model.gguf"))
    theirs, wanted = read(open_checkpoint(folder))
    near(ours, theirs)
    for parameter in theirs.parameters:
        np.testing.assert_array_equal(
            held.read([parameter.name]), wanted.read([parameter.name]), err_msg=parameter.name
        )


def test_every_family_that_is_declared_is_tested() -> None:
    assert {form.name for form in gguf_forms()} == set(gguf_files.NAMES.values())
    assert {form.model_type for form in gguf_forms()} <= set(gguf_files.NAMES)
    mixtures = {form.model_type for form in gguf_forms() if form.mixture and not form.refused}
    assert mixtures == {(MORE | families.FAMILIES)[name]().model_type for name in MIXTURES}


@pytest.mark.parametrize("kind", READ)
def test_values_are_the_packages_own(kind: str, folder: Path) -> None:
    families.save("llama", folder)
    width = 256
    blocks: dict[str, Any] = {}

    def change(writer: gguf.GGUFWriter, tensors: gguf_files.Tensors) -> None:
        for at, (name, rows) in enumerate((("attn_v", 48), ("attn_q", 32))):
            key = f"blk.0.{name}.weight"
            values = np.random.default_rng(at).standard_normal((rows, width)).astype(np.float32)
            if kind in ("F32", "F16", "BF16"):
                raw = gguf.quants.quantize(values, Kind[kind])
            else:
                raw = gguf_files.random_blocks(Kind[kind], rows, width, seed=at)
            blocks[key] = gguf.quants.dequantize(raw, Kind[kind])
            writer.add_tensor(key, raw, raw_dtype=Kind[kind])
            del tensors[key]

    gguf_files.write(folder, folder / "model.gguf", change=change)
    weights = open_gguf(folder / "model.gguf").weights
    plain = weights["model.layers.0.self_attn.v_proj.weight"]
    assert plain.shape == (48, width)
    expected = blocks["blk.0.attn_v.weight"]
    assert np.isfinite(expected).all()
    for a, b in ((0, 48), (0, 1), (7, 23), (47, 48)):
        np.testing.assert_array_equal(plain.rows(a, b).view(np.uint32), expected[a:b].view(np.uint32))
    np.testing.assert_array_equal(plain.columns(3, 40), expected[:, 3:40].T)
    # Of q the halves of each of the four heads are put back, whatever rows are asked for.
    turned = weights["model.layers.0.self_attn.q_proj.weight"]
    whole = blocks["blk.0.attn_q.weight"].reshape(4, 4, 2, width).swapaxes(1, 2).reshape(32, width)
    for a, b in ((0, 32), (0, 1), (3, 21), (31, 32)):
        np.testing.assert_array_equal(turned.rows(a, b), whole[a:b])


def test_parts(folder: Path) -> None:
    families.save("qwen2", folder)
    gguf_files.write(folder, folder / "whole.gguf")
    gguf_files.write(folder, folder / "model.gguf", split=5)
    parts = sorted(folder.glob("model-*.gguf"))
    assert len(parts) > 3
    whole = open_gguf(folder / "whole.gguf")
    for part in (parts[0], parts[2]):
        checkpoint = open_gguf(part)
        assert checkpoint.config == whole.config
        assert set(checkpoint.weights) == set(whole.weights)
        for name, weight in checkpoint.weights.items():
            np.testing.assert_array_equal(
                weight.rows(0, weight.shape[0]), whole.weights[name].rows(0, weight.shape[0])
            )


def test_fused_projections_are_taken_apart(folder: Path) -> None:
    families.save("qwen3", folder)

    def change(writer: gguf.GGUFWriter, tensors: gguf_files.Tensors) -> None:
        for layer in range(2):
            parts = [tensors.pop(f"blk.{layer}.attn_{p}.weight") for p in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts)

    gguf_files.write(folder, folder / "model.gguf", change=change)
    _, held = read(open_gguf(folder / "model.gguf"))
    theirs, wanted = read(open_checkpoint(folder))
    for parameter in theirs.parameters:
        np.testing.assert_array_equal(held.read([parameter.name]), wanted.read([parameter.name]))


def test_what_else_a_checkpoint_has(folder: Path) -> None:
    families.save("llama", folder)

    def change(writer: gguf.GGUFWriter, tensors: gguf_files.Tensors) -> None:
        writer.add_eot_token_id(6)
        writer.add_float32("general.sampling.temp", 0.7)
        writer.add_int32("general.sampling.top_k", 20)

    gguf_files.write(folder, folder / "model.gguf", change=change)
    checkpoint = find_checkpoint(folder / "model.gguf")
    assert checkpoint.path == folder / "model.gguf"
    assert checkpoint.source == str(folder / "model.gguf")
    assert (checkpoint.config["bos_token_id"], checkpoint.config["pad_token_id"]) == (1, 0)
    generation = checkpoint.json("generation_config.json")
    assert generation["eos_token_id"] == [2, 6]
    assert (generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.7, 20, True)
    assert 'license: "apache-2.0"' in (checkpoint.folder / "README.md").read_text()
    assert checkpoint.json("tokenizer_config.json")["chat_template"] == families.CHAT_TEMPLATE
    made = checkpoint.folder
    assert made.is_dir()
    del checkpoint
    assert not made.exists()


def test_templates_under_names(folder: Path) -> None:
    families.save("llama", folder)
    gguf_files.write(
        folder,
        folder / "model.gguf",
        change=lambda writer, _: writer.add_chat_template([{"name": "tool_use", "template": "tools"}]),
    )
    named = open_gguf(folder / "model.gguf").json("tokenizer_config.json")["chat_template"]
    assert {entry["name"]: entry["template"] for entry in named} == {
        "default": families.CHAT_TEMPLATE,
        "tool_use": "tools",
    }


def test_numbers_are_what_was_written(folder: Path) -> None:
    """A float32 is read as the shortest decimal that gives it, as config.json has it."""
    families.save("llama", folder)
    gguf_files.write(folder, folder / "model.gguf")
    config = json.loads((folder / "config.json").read_text())
    assert open_gguf(folder / "model.gguf").config["rms_norm_eps"] == config["rms_norm_eps"]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_computes_what_it_was_converted_from(name: str, folder: Path) -> None:
    model = families.save(name, folder)
    gguf_files.write(folder, folder / "model.gguf")
    built = ortlm.build(folder / "model.gguf", folder / "out", precision="fp32")
    tokens = oracle.random_tokens(24)
    got = ortlm.load(built.path, threads=1).logits(tokens)
    assert oracle.relative_error(got, oracle.prompt_logits(model, tokens)) < 1e-5


@pytest.mark.parametrize("kind", ["Q8_0", "MXFP4"])
def test_experts_are_carried_over(kind: str, folder: Path) -> None:
    """All codes of experts are in the artifact; activations of experts with 8 bits are rounded to 8 bits."""
    families.save("gpt-oss-as-published", folder)
    gguf_files.write(folder, folder / "plain.gguf")

    def change(writer: gguf.GGUFWriter, tensors: gguf_files.Tensors) -> None:
        for key in [key for key in tensors if key.endswith("_exps.weight")]:
            value = tensors.pop(key)
            raw = gguf.quants.quantize(value.reshape(-1, value.shape[2]), Kind[kind])
            writer.add_tensor(key, raw.reshape(*value.shape[:2], -1), raw_dtype=Kind[kind])

    gguf_files.write(folder, folder / "model.gguf", change=change)
    weight = open_gguf(folder / "model.gguf").weights["layers.1.expert_up.weight"]
    assert isinstance(weight, BlockWeight)
    assert weight.calibrated == (kind == "MXFP4")
    one = weight.at(2)
    assert isinstance(one, BlockWeight)
    codes, scales, _ = one.codes(3, 40, Grid(8, 32))
    values = (codes.astype(np.float32) - 128).reshape(37, -1, 32) * scales[..., None]
    np.testing.assert_array_equal(values.reshape(37, -1), one.rows(3, 40))
    np.testing.assert_array_equal(one.rows(3, 40), weight.rows(2, 3)[0, 3:40])
    options = BuildOptions(recipe="fast", keep_quantization=True)
    kept = ortlm.build(folder / "model.gguf", folder / "kept", precision="int8", options=options)
    said = json.loads((kept.path / "ortlm.json").read_text())["info"]
    assert f"{kind} (" in said["stored_before"]
    assert "carried over" in said["stored_before"]
    whole = ortlm.build(folder / "model.gguf", folder / "whole", precision="fp32")
    tokens = oracle.random_tokens(24)
    logits = [ortlm.load(each.path, threads=1).logits(tokens) for each in (kept, whole)]
    assert oracle.relative_error(*logits) < 0.1


def test_sizes_of_experts_that_an_old_file_does_not_state(folder: Path) -> None:
    families.save("qwen2-moe-as-published", folder)
    config = json.loads((folder / "config.json").read_text())
    path = folder / "model.gguf"
    gguf_files.write(folder, path)
    stated = open_gguf(path).config
    assert (stated["moe_intermediate_size"], stated["shared_expert_intermediate_size"]) == (32, 64)
    assert stated["intermediate_size"] == config["intermediate_size"]
    raw = path.read_bytes()
    for key in (b"expert_feed_forward_length", b"expert_shared_feed_forward_length"):
        raw = raw.replace(b"qwen2moe." + key, b"qwen2m0e." + key)
    path.write_bytes(raw)
    found = open_gguf(path).config
    assert found["moe_intermediate_size"] == config["intermediate_size"] // config["num_experts_per_tok"]
    assert found["shared_expert_intermediate_size"] == config["intermediate_size"]
