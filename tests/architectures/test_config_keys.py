"""A key of ``config.json`` that changes what transformers computes is followed, or refused by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma4TextConfig

import ortlm
from ortlm import architectures
from ortlm.errors import BadCheckpoint, Error, UnsupportedModel
from tests.architectures import changes, families, oracle

# Every change of every row takes minutes: ORTLM_EVERY_KEY=1. By default a row's own keys are tried, of one family
# for each way to read them, and those of others where families differ most.
EVERY = os.environ.get("ORTLM_EVERY_KEY") == "1"
ROWS = (
    list(families.FAMILIES)
    if EVERY
    else [
        "phi3-longrope",
        "llama3",
        "mistral",
        "gemma3",
        "granite",
        "phimoe",
        "gpt-oss",
        "cohere2",
        "glm4",
        "exaone4",
        "gemma4",
        "gemma4-e",
        "gemma4-moe",
        "gemma3n",
        "qwen3.5",
        "qwen3-next-moe",
        "granite4-h",
    ]
)
FOREIGN_TOO = ("mistral", "gemma3", "llama3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_changed_key_is_followed_or_refused(name: str, tmp_path: Path) -> None:
    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    other.mkdir()
    config, weights, first = changes.base_of(name, checkpoint)
    base = architectures.describe(config)
    wrong, followed = [], 0
    for path, value in changes.changes(config, foreign=EVERY or name in FOREIGN_TOO):
        changed = changes.changed(config, path, value)
        try:
            found = architectures.describe(changed)
        except Error:
            continue
        try:
            want = changes.logits(changes.torch_model(changed, weights, other), changes.TOKENS)
        except changes.NoModel:
            # Nor must the build make anything of it, unless it is the same model without the key.
            same = path[-1] in ("head_dim", "layer_types") or path[-1].startswith("mamba_")
            same = same or path[-1] == "output_router_logits"
            want = first if same else None
        if (found.decoder, found.sources) == (base.decoder, base.sources):
            got = first
        else:
            (checkpoint / "config.json").write_text(json.dumps(changed))
            try:
                ortlm.build(checkpoint, tmp_path / "out", precision="fp32", force=True)
            except BadCheckpoint:
                continue  # other shapes than the weights have
            got = ortlm.load(tmp_path / "out", threads=1).logits(changes.TOKENS)
            followed += 1
        if want is None or oracle.relative_error(got, want) > 1e-4:
            wrong.append((path, value))
    assert not wrong
    assert followed >= 3


CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_published_files_have_no_key_that_is_not_known(path: Path) -> None:
    assert architectures.describe(json.loads(path.read_text())).notes == ()


def smollm() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS[0].parent / "smollm-1.7b.json").read_text())
    return found


@pytest.mark.parametrize(
    "extra",
    [
        {"unsloth_version": "2026.1"},
        {"unsloth_fixed": True},
        {"_name_or_path": "x"},
        {"my_project": {"a": [1]}},
        {"_attn_implementation_autoset": True},
        {"use_flash_attn": True},
        {"dataset_size": 5},
        {"max_steps": 10},
        {"training_state": "done"},
        {"neftune_noise_alpha": 5},
        {"quantization_config": None},
        {"num_labels": 3},
        {"mlp_dropout": 0.1},
        {"clip_qkv": None},
        {"num_experts": 0},
        {"sliding_window": 131072},
        {"is_causal": True},
        {"residual_multiplier": 1.0},
        {"rope_scaling": {}},
        {"author": "me"},
        {"pretraining_tp": 2},
        {"layer_types": ["full_attention"] * 24},
        {"merge_method": "slerp"},
        {"suppress_tokens": [1]},
    ],
    ids=str,
)
def test_bookkeeping_builds(extra: dict[str, Any]) -> None:
    found = architectures.describe(smollm() | extra)
    assert found.decoder == architectures.describe(smollm()).decoder


@pytest.mark.parametrize(
    "extra",
    [
        {"sliding_window": 8},
        {"use_sliding_window": True},
        {"layer_types": ["sliding_attention"] * 24},
        {"clip_qkv": 8.0},
        {"qk_layernorm": True},
        {"use_qk_norm": True},
        {"logit_scale": 0.1},
        {"logits_scaling": 2},
        {"residual_multiplier": 0.2},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"no_rope_layers": [0] * 24},
        {"scale_embedding": True},
        {"is_causal": False},
        {"num_experts": 8},
        {"use_bidirectional_attention": True},
        {"attention_multiplier": 0.5},
        {"query_pre_attn_scalar": 224},
        {"rotary_pct": 0.25},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [8, 12, 12]}},
        {"alibi": True},
        {"parallel_attn": True},
        {"attention_chunk_size": 512},
        {"use_rope": False},
        {"per_layer_config": {"0": {"head_dim": 32}}},
        {"d_model": 99},
        {"qkv_bias": True},
        {"mup_scale": 2.0},
        {"embedding_multiplier": 12},
        {"lm_head_bias": True},
        {"moe_intermediate_size": 5},
        {"attention_sinks": 4},
    ],
    ids=str,
)
def test_what_may_change_the_model_is_refused_by_name(extra: dict[str, Any]) -> None:
    key = "mrope_section" if "rope_scaling" in extra else next(iter(extra))
    with pytest.raises(UnsupportedModel, match=f'"{key}"'):
        architectures.describe(smollm() | extra)


# What published files of a family say in further words, and values of it that would be another model.
SAID = {
    "cohere2": (
        {
            "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True,
            "use_parallel_block": True, "use_parallel_embedding": False, "cache_implementation": "hybrid",
        },
        {
            "layer_switch": 5, "order_of_interleaved_layers": "global_first", "use_gated_activation": False,
            "position_embedding_type": "alibi", "use_parallel_block": False,
        },
    ),
    "nemotron": ({"rope_percent": 0.5, "rope_scaling": None}, {"rope_percent": 0.25, "kv_channels": 7}),
    "starcoder2": (
        {
            "activation_function": "gelu", "attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-5,
            "mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True,
            "scale_attention_softmax_in_fp32": True, "embedding_dropout": 0.1, "residual_dropout": 0.1,
        },
        {"norm_type": "rms_norm", "mlp_type": "gated", "scale_attn_weights": False},
    ),
    "stablelm": (
        {"norm_eps": 1e-5, "rope_pct": 0.25, "rotary_scaling_factor": 1.0},
        {"norm_eps": 1e-6, "rope_pct": 0.5},
    ),
    "hunyuan": (
        {
            "attention_head_dim": 32, "cla_share_factor": 2, "use_cla": False, "use_qk_norm": True,
            "norm_type": "hf_rms", "org_vocab_size": 290, "enable_lm_head_fp32": True, "class_num": 0,
            "dense_list": [64, 0], "add_classification_head": False, "use_rotary_pos_emb": True,
        },
        {"attention_head_dim": 64, "use_cla": True, "use_qk_norm": False, "use_rotary_pos_emb": False},
    ),
    "ernie4.5": ({"compression_ratio": 1.0}, {"compression_ratio": 2.0}),
    "granite4": (
        {"normalization_function": "rmsnorm", "init_method": "mup"},
        {"normalization_function": "layernorm"},
    ),
    "apertus": ({"qk_norm": True, "post_norm": False, "mlp_bias": False}, {"qk_norm": False, "post_norm": True}),
    "lfm2": (
        {"block_dim": 64, "conv_dim": 64, "use_pos_enc": True, "block_use_swiglu": True, "num_heads": 4},
        {},
    ),
    "qwen3.5": (
        {
            "attn_output_gate": True, "mamba_ssm_dtype": "float32", "mlp_only_layers": [],
            "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        },
        {"attn_output_gate": False, "mlp_only_layers": [1]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_published_files_say_in_further_words(name: str) -> None:
    config = json.loads(families.FAMILIES[name]().to_json_string())
    plain, (said, others) = architectures.describe(config), SAID[name]
    found = architectures.describe(config | said)
    assert (found.decoder, found.sources) == (plain.decoder, plain.sources)
    for key, value in others.items():
        with pytest.raises(UnsupportedModel, match=f'"{key}"'):
            architectures.describe(config | {key: value})


def test_old_and_new_names_of_lfm2_in_one_file() -> None:
    # What was published with the old names and saved again has both.
    config = json.loads(families.FAMILIES["lfm2"]().to_json_string())
    both = config | {
        "block_ff_dim": config["intermediate_size"],
        "tie_embedding": config["tie_word_embeddings"],
        "intermediate_size": 7,
        "tie_word_embeddings": not config["tie_word_embeddings"],
    }
    assert architectures.describe(both) == architectures.describe(config)


def test_sizes_of_gemma4_by_layer_where_there_are_ten_or_more() -> None:
    config = Gemma4TextConfig(
        **families.sizes(num_hidden_layers=12, hidden_size_per_layer_input=0, head_dim=16, global_head_dim=32)
    )
    saved = json.loads(config.to_json_string())
    assert list(saved["per_layer_config"]) == ["05", "11"]
    plain = {key: value for key, value in saved.items() if key != "per_layer_config"} | {
        "global_head_dim": 32
    }
    assert architectures.describe(saved).decoder == architectures.describe(plain).decoder


def test_a_key_that_nobody_knows_is_told() -> None:
    (note,) = architectures.describe(smollm() | {"my_project": 1, "color": "red"}).notes
    assert "my_project" in note
    assert "color" in note


@pytest.mark.parametrize(
    ("kinds", "windows"),
    [("full", [None] * 2), ("sliding", [8, 8]), ("mixed", [8, None])],
)
def test_layer_types_of_mistral(kinds: str, windows: list[int | None], tmp_path: Path) -> None:
    config, weights, _ = changes.base_of("mistral", tmp_path / "checkpoint")
    config["layer_types"] = changes.kinds_of(kinds, 2)
    assert [x.mixer.window for x in architectures.describe(config).decoder.layers] == windows
    ministral = {**config, "model_type": "ministral"}
    assert architectures.describe(ministral) == architectures.describe(config)
    model = changes.torch_model(config, weights, tmp_path)
    assert type(model).__name__ == "MinistralForCausalLM"
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    ortlm.build(tmp_path / "checkpoint", tmp_path / "out", precision="fp32")
    lm = ortlm.load(tmp_path / "out", threads=1)
    tokens = changes.TOKENS
    want = changes.logits(model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < 1e-4
    assert oracle.relative_error(lm.logits_batch([tokens[:20]], [tokens[20:]])[0], want[19:]) < 1e-4


@pytest.mark.parametrize("name", ["mistral", "qwen2", "smollm3"])
def test_sliding_layers_without_a_window_are_refused(name: str) -> None:
    config = json.loads(families.FAMILIES[name]().to_json_string())
    layers = config["num_hidden_layers"]
    config |= {"layer_types": ["sliding_attention"] * layers, "sliding_window": None}
    with pytest.raises(BadCheckpoint, match="sliding_window"):
        architectures.describe(config)


def test_pattern_of_gemma3_without_layer_types_is_passed_over_as_in_transformers() -> None:
    config = json.loads(families.FAMILIES["gemma3"]().to_json_string())
    del config["layer_types"], config["sliding_window_pattern"]
    config["_sliding_window_pattern"] = 2
    config["num_hidden_layers"] = 8
    found = architectures.describe(config)
    assert [i for i, x in enumerate(found.decoder.layers) if x.mixer.window is None] == [5]
    assert "_sliding_window_pattern" in found.notes[0]


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_original_length_of_phi3_inside_the_rope_keys_is_passed_over_as_in_transformers(
    where: str, tmp_path: Path
) -> None:
    config, weights, _ = changes.base_of("phi3-longrope", tmp_path / "checkpoint")
    rope = config.pop("rope_parameters")
    config.pop("original_max_position_embeddings")
    config[where] = {**rope, "original_max_position_embeddings": 64}
    config["max_position_embeddings"] = 8192
    found = architectures.describe(config)
    assert "original_max_position_embeddings" in found.notes[0]
    assert found.decoder.layers[0].mixer.rope.switch_tokens == 4096  # type: ignore[union-attr]
    model = changes.torch_model(config, weights, tmp_path)
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    ortlm.build(tmp_path / "checkpoint", tmp_path / "out", precision="fp32")
    got = ortlm.load(tmp_path / "out", threads=1).logits(changes.TOKENS)
    assert oracle.relative_error(got, changes.logits(model, changes.TOKENS)) < 1e-4


HUGE = 10**400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 100_000),
        ("num_hidden_layers", HUGE),
        ("hidden_size", 2**40),
        ("head_dim", 10**18),
        ("vocab_size", 2**40),
        ("intermediate_size", HUGE),
        ("max_position_embeddings", 10**18),
        ("rope_theta", HUGE),
        ("rope_theta", 1e300),
        ("rope_theta", 1e-300),
        ("rms_norm_eps", HUGE),
        ("rms_norm_eps", 5.0),
        ("rms_norm_eps", 0),
        ("max_position_embeddings", 10_000_001),
        ("num_attention_heads", HUGE),
        ("rope_theta", "1e4"),
        ("rope_theta", True),
        ("rope_theta", float("inf")),
        ("rope_theta", float("nan")),
    ],
)
def test_absurd_values_are_refused_before_anything_is_made(key: str, value: Any) -> None:
    with pytest.raises(BadCheckpoint, match=key) as caught:
        architectures.describe(smollm() | {key: value})
    assert len(str(caught.value)) < 300


def test_a_long_context_is_cut_and_told() -> None:
    found = architectures.describe(smollm() | {"max_position_embeddings": 10_000_000})
    assert found.decoder.max_tokens == 2**20
    assert "max_position_embeddings" in found.notes[0]
