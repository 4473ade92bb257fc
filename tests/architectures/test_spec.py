"""Every family's spec against the torch model that transformers builds from the same config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, Olmo3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ortlm import architectures
from ortlm.architectures import _find
from ortlm.errors import BadCheckpoint, UnsupportedModel
from ortlm.spec import Architecture, Attention, Rope, parameters
from tests.architectures import families, test_text_parts

CONFIGS = Path(__file__).parent / "configs"

# Number of weights, a tied head not counted twice.
PARAMETERS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-7b": 8_537_680_896,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.2": 7_241_732_096,
    "phi-2": 2_779_683_840,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-4b": 4_022_468_096,
    "smollm-1.7b": 1_711_376_384,
}


def real(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


@pytest.fixture(scope="module", params=families.FAMILIES)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return one saved tiny model: its name, torch model, config.json, tensor shapes and architecture."""
    folder = tmp_path_factory.mktemp("model")
    model = families.save(request.param, folder)
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return SimpleNamespace(
        name=request.param, model=model, config=config, tensors=tensors, arch=architectures.describe(config)
    )


def test_every_tensor_is_used_once_and_shapes_agree(row: Any) -> None:
    wanted = {p.name: p for p in parameters(row.arch.decoder)}
    sources = row.arch.sources
    assert set(sources) == set(wanted)
    assert {tensor for s in sources.values() for tensor in (s.tensor, *s.below)} == set(row.tensors)
    used = {name: np.zeros(tensor.shape, int) for name, tensor in row.tensors.items()}
    for name, source in sources.items():
        for tensor in source.below:
            used[tensor] += 1
        there = used[source.tensor]
        if source.index is not None:
            there = there[source.index]
        if source.transposed:
            there = there.T
        if source.stored is not None:
            assert there.shape == source.stored
            there = there.reshape(wanted[name].shape)
        whole = source.rows or (0, len(there))
        pieces = [there[begin : end : source.step] for begin, end in source.pieces or (whole,)]
        count = sum(map(len, pieces)) * (1 + len(source.below))
        assert (count, *there.shape[1:]) == wanted[name].shape, name
        for piece in pieces:
            piece += 1
    assert all((counts == 1).all() for counts in used.values())


def test_old_and_new_config_keys_give_the_same_spec(row: Any) -> None:
    saved = json.loads(row.model.config.to_json_string())
    assert "rope_parameters" in saved
    if row.name.startswith("gemma4"):
        return  # it came after the old ones
    old = families.old_keys(saved)
    assert "rope_parameters" not in old
    assert "rope_theta" in old
    assert architectures.describe(saved) == row.arch
    assert architectures.describe(old) == row.arch


def test_defaults_of_absent_keys_are_those_of_transformers(row: Any) -> None:
    # These have no default that goes with the other sizes.
    more = {
        "helium": ["head_dim"],
        "gemma4_text": ["hidden_size_per_layer_input"],
        "gemma3n_text": ["layer_types", "num_kv_shared_layers"],
        "granitemoehybrid": ["layer_types"],
    }.get(row.config["model_type"], [])
    kept = (*families.sizes(), "model_type", "num_key_value_heads", *more)
    short = {key: row.config[key] for key in kept}
    full = json.loads(AutoConfig.for_model(**copy.deepcopy(short)).to_json_string())
    assert len(full) > len(short)
    assert architectures.describe(short) == architectures.describe(full)


def test_attention_agrees_with_the_torch_modules(row: Any) -> None:
    decoder, config = row.arch.decoder, row.model.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    for i, (layer, module) in enumerate(zip(decoder.layers, row.model.model.layers, strict=True)):
        assert layer.residual_scale == getattr(module, "residual_multiplier", 1.0)
        if not isinstance(layer.mixer, Attention):
            continue
        attention = module.self_attn
        assert layer.mixer.head_dim == attention.head_dim
        assert layer.mixer.heads // layer.mixer.kv_heads == attention.num_key_value_groups
        assert layer.mixer.scale == pytest.approx(attention.scaling, rel=1e-12)
        slides = window is not None and window < 512 and (kinds is None or kinds[i] == "sliding_attention")
        assert layer.mixer.window == (window if slides else None)
        scaled = config.model_type == "ministral3"
        assert (layer.mixer.query_scale is not None) == scaled
        assert (layer.mixer.rope is not None) == rotates(row.model, i)
        # Gemma 3 has the key too, but its attention does not look at it.
        capped = config.model_type == "gemma2"
        assert layer.mixer.softcap == (config.attn_logit_softcapping if capped else 0.0)
    assert decoder.max_tokens == config.max_position_embeddings
    assert decoder.tied_head == config.tie_word_embeddings
    assert decoder.logit_softcap == (getattr(config, "final_logit_softcapping", None) or 0.0)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    assert decoder.logit_scale == scale
    embed = row.model.get_input_embeddings()
    scale = getattr(embed, "scalar_embed_scale", getattr(config, "embedding_multiplier", 1.0))
    assert decoder.embed_scale == pytest.approx(scale, rel=1e-12)


def rotates(model: Any, layer: int) -> bool:
    """Return whether ``layer`` of the torch ``model`` rotates queries and keys."""
    config, attention = model.config, model.model.layers[layer].self_attn
    if config.model_type in ("cohere2", "exaone4"):
        return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"
    return rotation(model) is not None and bool(getattr(attention, "use_rope", True))


def rotation(model: Any) -> Any:
    """Return the module that computes cosines and sines, None if there is none."""
    # LFM2 with experts has another name for it.
    return model.model.pos_emb if hasattr(model.model, "pos_emb") else model.model.rotary_emb


# Those that rotate neighbors.
INTERLEAVED = ("cohere", "cohere2", "glm", "glm4", "helium", "ernie4_5")


def test_norms_agree_with_the_torch_modules(row: Any) -> None:
    modules = dict(row.model.named_modules())
    decoder = row.arch.decoder
    norms = {"final_norm": decoder.final_norm}
    for i, layer in enumerate(decoder.layers):
        norms |= {f"layers.{i}.{part}": getattr(layer, part) for part in ("mixer_pre", "mixer_post")}
        norms |= {f"layers.{i}.{part}": getattr(layer, part) for part in ("ffn_pre", "ffn_post")}
        if isinstance(layer.mixer, Attention):
            norms |= {f"layers.{i}.{part}": layer.mixer.qk_norm for part in ("q_norm", "k_norm")}
    for name, norm in norms.items():
        if norm is None or f"{name}.weight" not in row.arch.sources:  # of keys that are another layer's
            continue
        source = row.arch.sources[f"{name}.weight"]
        module = modules[source.tensor.removesuffix(".weight")]
        assert norm.eps == getattr(module, "variance_epsilon", getattr(module, "eps", None))
        assert norm.kind == ("layer" if "LayerNorm" in type(module).__name__ else "rms")
        assert norm.bias == (getattr(module, "bias", None) is not None)
        # A norm of ones shows what is stored for it.
        x = torch.randn(module.weight.shape, dtype=torch.float64).float()
        plain = x / torch.sqrt((x**2).mean() + norm.eps)
        if norm.kind == "rms":
            expected = plain * (module.weight + source.add)
            torch.testing.assert_close(module(x), expected)


def test_rope_agrees_with_the_torch_modules(row: Any) -> None:
    check_rope(row.arch, row.model.config, rotation(row.model))


def check_rope(arch: Architecture, config: Any, rotary: Any) -> None:
    """Compare every layer's frequencies, to one unit in the last place, and factors with ``rotary``."""
    for i, layer in enumerate(arch.decoder.layers):
        rope = layer.mixer.rope if isinstance(layer.mixer, Attention) else None
        if rope is None:
            continue
        prefix = f"{config.layer_types[i]}_" if not hasattr(rotary, "inv_freq") else ""
        assert ulps(rope.inv_freq, getattr(rotary, f"{prefix}original_inv_freq")) <= 1
        assert rope.factor == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"), rel=1e-12)
        assert rope.interleaved == (config.model_type in INTERLEAVED)
        if rope.long_inv_freq is not None:
            assert rope.switch_tokens == config.rope_parameters["original_max_position_embeddings"]
            long, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=rope.switch_tokens + 1)
            assert ulps(rope.long_inv_freq, long) <= 1
            factor = config.rope_parameters.get("long_mscale", factor)
            assert rope.long_factor == pytest.approx(factor, rel=1e-12)


def ulps(ours: tuple[float, ...], theirs: torch.Tensor) -> int:
    """Return the largest distance in float32 units in the last place; ours must be exact float32 values."""
    a = np.array(ours, np.float64)
    assert np.array_equal(a.astype(np.float32).astype(np.float64), a)
    steps = a.astype(np.float32).view(np.int32) - theirs.numpy().view(np.int32)
    return int(np.abs(steps).max())


def test_phi_3_5_moe() -> None:
    """Its experts are one tensor in transformers' classes, so only numbers can be compared."""
    config = real("phi-3.5-moe")
    arch = architectures.describe(config)
    torch_config = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "auto_map"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(torch_config)
    count = sum(p.size for p in parameters(arch.decoder))
    assert count == sum(p.numel() for p in model.parameters()) == 41_873_153_344
    rope = arch.decoder.layers[0].mixer.rope
    assert rope is not None
    assert (rope.factor, rope.long_factor, rope.switch_tokens) == (1.243163121016122, 1.243163121016122, 4096)
    first, last = (arch.sources[f"layers.31.expert_{part}.15.weight"].tensor for part in ("gate", "down"))
    assert first == "model.layers.31.block_sparse_moe.experts.15.w1.weight"
    assert last == "model.layers.31.block_sparse_moe.experts.15.w2.weight"


@pytest.mark.parametrize("name", PARAMETERS)
def test_real_config(name: str) -> None:
    config = real(name)
    arch = architectures.describe(config)
    assert sum(p.size for p in parameters(arch.decoder)) == PARAMETERS[name]
    torch_config = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "auto_map"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(torch_config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {source.tensor for source in arch.sources.values()} == set(shapes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    rotary = type(rotation(model))(torch_config)
    check_rope(arch, torch_config, rotary)


def test_real_configs_are_all_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {*PARAMETERS, "phi-3.5-moe"}


def test_values_of_real_configs() -> None:
    def rope_of(name: str) -> Rope:
        found = architectures.describe(real(name)).decoder.layers[0].mixer.rope
        assert found is not None
        return found

    def windows(name: str) -> list[int | None]:
        return [layer.mixer.window for layer in architectures.describe(real(name)).decoder.layers]

    assert windows("phi-3-mini-4k") == [2047] * 32
    assert windows("phi-3.5-mini") == [None] * 32
    assert windows("mistral-7b-v0.2") == [None] * 32
    assert windows("gemma-2-2b") == [4096, None] * 13
    assert windows("gemma-3-1b")[:7] == [512] * 5 + [None] + [512]
    assert windows("qwen2-7b") == [None] * 28
    assert rope_of("phi-3-mini-4k").long_inv_freq is None
    assert rope_of("phi-3.5-mini").switch_tokens == 4096
    assert rope_of("phi-3.5-mini").factor == pytest.approx(1.1902380714, rel=1e-9)
    assert rope_of("phi-4-mini").dims == 96
    assert rope_of("phi-2").dims == 32
    ffn = architectures.describe(real("gemma-7b")).decoder.layers[0].ffn
    assert ffn.act == "gelu_tanh"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi-2", {"qk_layernorm": True}),
        ("qwen3-4b", {"attention_bias": True}),
        ("gemma-2-2b", {"attention_bias": True}),
        ("gemma-3-1b", {"attention_bias": True, "tie_word_embeddings": False}),
        ("phi-3.5-mini", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
    ],
)
def test_weights_of_rare_variants(name: str, changes: dict[str, Any]) -> None:
    config = real(name) | changes
    arch = architectures.describe(config)
    torch_config = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "auto_map"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(torch_config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {source.tensor for source in arch.sources.values()} == set(shapes)
    for parameter in parameters(arch.decoder):
        source = arch.sources[parameter.name]
        if source.rows is None:
            assert shapes[source.tensor] == parameter.shape
    assert sum(p.size for p in parameters(arch.decoder)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_spellings_of_longrope_in_phi3(kind: str) -> None:
    config = real("phi-3.5-mini")
    changed = config | {"rope_scaling": config["rope_scaling"] | {"type": kind}}
    assert architectures.describe(changed) == architectures.describe(config)


def test_longrope_factors_that_are_given() -> None:
    config = real("phi-3.5-mini")

    def factors(**keys: float) -> tuple[float, float]:
        arch = architectures.describe(config | {"rope_scaling": config["rope_scaling"] | keys})
        rope = arch.decoder.layers[0].mixer.rope
        assert rope is not None
        return rope.factor, rope.long_factor

    assert factors(attention_factor=1.5) == (1.5, 1.5)
    assert factors(factor=1.0) == (1.0, 1.0)
    # transformers looks at them in another family only.
    with pytest.raises(UnsupportedModel, match="short_mscale"):
        factors(short_mscale=1.1, long_mscale=1.3)


def test_longrope_within_the_original_length_never_switches() -> None:
    config = real("phi-3.5-mini") | {"max_position_embeddings": 4096}
    rope = architectures.describe(config).decoder.layers[0].mixer.rope
    assert rope is not None
    assert (rope.long_inv_freq, rope.switch_tokens, rope.factor) == (None, None, 1.0)


def test_dynamic_scaling_is_plain_within_the_context() -> None:
    config = real("smollm-1.7b")
    dynamic = config | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    assert architectures.describe(dynamic) == architectures.describe(config)
    torch_config = AutoConfig.for_model(**copy.deepcopy(dynamic))
    inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        torch_config, "cpu", seq_len=config["max_position_embeddings"]
    )
    rope = architectures.describe(dynamic).decoder.layers[0].mixer.rope
    assert rope is not None
    assert ulps(rope.inv_freq, inv_freq) <= 1


@pytest.mark.parametrize(
    "keys",
    [
        {"factor": 4.0, "original_max_position_embeddings": 512},
        {"factor": 4.0, "original_max_position_embeddings": 512, "truncate": False},
        {"factor": 40.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 0.8},
        {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 64.0, "beta_slow": 2.0},
        {"factor": 4.0, "attention_factor": 1.25},
    ],
)
def test_yarn_keys(keys: dict[str, Any]) -> None:
    config = real("smollm-1.7b") | {"rope_scaling": {"rope_type": "yarn"} | keys}
    torch_config = AutoConfig.for_model(**copy.deepcopy(config))
    inv_freq, factor = ROPE_INIT_FUNCTIONS["yarn"](torch_config, "cpu")
    rope = architectures.describe(config).decoder.layers[0].mixer.rope
    assert rope is not None
    assert ulps(rope.inv_freq, inv_freq) <= 1
    assert rope.factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "lama"}, UnsupportedModel, ['"lama"', "Did you mean: llama", "phi3", "qwen2"]),
        ({"model_type": "mamba"}, UnsupportedModel, ['"mamba"', "Known types"]),
        ({"model_type": None}, BadCheckpoint, ["model_type", "None", "llama"]),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            UnsupportedModel,
            ["architectures", "causal"],
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedModel, ["gptq", "already"]),
        ({"hidden_size": 0}, BadCheckpoint, ['"hidden_size" is 0', ">= 1"]),
        ({"hidden_size": "2048"}, BadCheckpoint, ["\"hidden_size\" is '2048'", "whole number"]),
        ({"hidden_size": True}, BadCheckpoint, ['"hidden_size" is True', "whole number"]),
        ({"hidden_size": None}, BadCheckpoint, ['"hidden_size" is null', "whole number"]),
        ({"hidden_size": 2047}, BadCheckpoint, ["hidden_size", "multiple", "32"]),
        ({"num_key_value_heads": 5}, BadCheckpoint, ["num_key_value_heads", "divisor", "32"]),
        ({"rms_norm_eps": -1e-5}, BadCheckpoint, ["rms_norm_eps", "> 0"]),
        ({"rms_norm_eps": float("nan")}, BadCheckpoint, ["rms_norm_eps", "nan"]),
        ({"tie_word_embeddings": "yes"}, BadCheckpoint, ["tie_word_embeddings", "true or false"]),
        ({"hidden_act": "xielu"}, UnsupportedModel, ["hidden_act", "xielu", "silu"]),
        ({"rope_scaling": 4.0}, BadCheckpoint, ["rope_scaling", "4.0", "object"]),
        ({"rope_scaling": {"type": "spiral"}}, UnsupportedModel, ["rope_type", "spiral", "longrope"]),
        ({"rope_scaling": {"type": "linear"}}, BadCheckpoint, ['"rope_scaling": "factor" is missing']),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, BadCheckpoint, ["factor", "> 0"]),
        ({"rope_theta": 0}, BadCheckpoint, ["rope_theta", "> 0"]),
        ({"partial_rotary_factor": 0.5}, UnsupportedModel, ["partial_rotary_factor"]),
        ({"partial_rotary_factor": 1.5}, BadCheckpoint, ["partial_rotary_factor", "64"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, UnsupportedModel, ["full_attention"]),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 32}},
            BadCheckpoint,
            ["short_factor", "(1 entries)", "32 numbers"],
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            BadCheckpoint,
            ["high_freq_factor", "low_freq_factor"],
        ),
    ],
)
def test_bad_values(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        architectures.describe(real("smollm-1.7b") | changes)
    assert "config.json" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("name", ["phi-3.5-mini", "phi-2", "gemma-3-1b", "qwen3-4b"])
def test_missing_key(name: str, key: str) -> None:
    config = real(name)
    del config[key]
    with pytest.raises(BadCheckpoint, match=f'config.json: "{key}" is missing, expected a whole number >= 1'):
        architectures.describe(config)


def test_bad_layer_types() -> None:
    config = real("gemma-2-2b")
    with pytest.raises(BadCheckpoint, match=r"layer_types.*26 layers"):
        architectures.describe(config | {"layer_types": ["full_attention"]})
    with pytest.raises(UnsupportedModel, match=r"chunked_attention.*layer 0"):
        architectures.describe(config | {"layer_types": ["chunked_attention"] * 26})
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention"):
        architectures.describe(config | {"use_bidirectional_attention": True})


SIGHTED = {"gemma3", "phi3_v", "qwen2_5_vl"}


def test_model_types() -> None:
    known = architectures.model_types()
    assert known == sorted(set(known))
    assert {json.loads(path.read_text())["model_type"] for path in CONFIGS.glob("*.json")} <= set(known)
    # Those that see images have tests of their own.
    text = {families.FAMILIES[name]().model_type for name in families.FAMILIES}
    whole = {make().model_type for make in test_text_parts.MODELS.values()} | {"phi4mm", "gemma3n"}
    # What transformers makes of a Mistral with layer types.
    assert text | whole | SIGHTED | {"ministral"} == set(known)


@pytest.mark.parametrize("flat", [families.yarn(), {"rope_type": "default", "rope_theta": 5e5}])
def test_rope_keys_of_olmo_3_for_all_layers(flat: dict[str, Any]) -> None:
    """transformers passes over them, and writes what it takes instead next to them."""
    config = json.loads(families.olmo3().to_json_string()) | {"rope_parameters": flat}
    written = json.loads(Olmo3Config(**copy.deepcopy(config)).to_json_string())
    assert set(written["rope_parameters"]) > set(flat)
    found = architectures.describe(config)
    assert found.decoder == architectures.describe(written).decoder
    assert any("passed over" in note for note in found.notes) == (flat["rope_type"] == "yarn")


def test_patterns_of_exaone_4() -> None:
    """A text says of each layer what it is, but the last one is always full."""
    config = json.loads(families.FAMILIES["exaone4"]().to_json_string())
    del config["layer_types"]
    config |= {"num_hidden_layers": 6, "sliding_window": 8}

    def windows(pattern: object) -> list[int | None]:
        decoder = architectures.describe(config | {"sliding_window_pattern": pattern}).decoder
        return [mixer.window for mixer in decoder.attentions]

    assert windows("LLLG") == [8, 8, 8, None, 8, None]
    assert windows("LG") == windows(2) == [8, None, 8, None, 8, None]
    assert windows(4) == [8, 8, 8, None, 8, 8]
    for wrong in ("LX", "", None, 0):
        with pytest.raises(BadCheckpoint, match="sliding_window_pattern"):
            windows(wrong)


def test_two_files_cannot_name_one_type() -> None:
    one = SimpleNamespace(__name__="one", MODEL_TYPES=("a", "b"), describe=None)
    two = SimpleNamespace(__name__="two", MODEL_TYPES=("b",), describe=None)
    with pytest.raises(ValueError, match='"b" is named by both one and two'):
        _find.table([one, two])  # type: ignore[list-item]


def test_rope_keys_that_divide_by_zero() -> None:
    config = json.loads((CONFIGS / "phi-3.5-mini.json").read_text())
    with pytest.raises(BadCheckpoint, match="rotary embedding"):
        _find.describe({**config, "original_max_position_embeddings": 1})
