"""The checkpoint in models/tiny-phi3 is what the demo and the end-to-end tests rely on."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[2] / "models" / "tiny-phi3"


@pytest.fixture(scope="module")
def config():
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    ],
)
def test_file_is_there(name):
    assert (FOLDER / name).stat().st_size > 0


def test_is_small():
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000


def test_sizes_suit_every_block_size(config):
    assert config["model_type"] == "phi3"
    assert config["hidden_size"] == 256
    assert config["intermediate_size"] % 128 == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] % 64 == 0
    assert "_name_or_path" not in config


def test_tensors_have_the_names_and_shapes_of_phi3(config):
    hidden, inter, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head = hidden // config["num_attention_heads"]
    expected = {
        "model.embed_tokens.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocab, hidden],
    }
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        expected |= {
            f"{at}.input_layernorm.weight": [hidden],
            f"{at}.self_attn.qkv_proj.weight": [hidden + 2 * head * config["num_key_value_heads"], hidden],
            f"{at}.self_attn.o_proj.weight": [hidden, hidden],
            f"{at}.post_attention_layernorm.weight": [hidden],
            f"{at}.mlp.gate_up_proj.weight": [2 * inter, hidden],
            f"{at}.mlp.down_proj.weight": [hidden, inter],
        }
    with safe_open(FOLDER / "model.safetensors", framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert {name: part.get_shape() for name, part in slices.items()} == expected
    assert {part.get_dtype() for part in slices.values()} == {"BF16"}


def test_card_states_licence_loss_and_origin():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for words in ("licence", "PSF License", "Loss", "Perplexity", "held-out", "CPython", "train_tiny.py"):
        assert words in card


@pytest.mark.parametrize(
    "text",
    [
        "def read_file(path):\n    return open(path).read()\n",
        "naïve Größe — 数 🙂",
        "  tabs\tand   spaces \n\n",
    ],
)
def test_tokenizer_returns_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens(tokenizer, config):
    names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    ids = [tokenizer.token_to_id(name) for name in names]
    assert tokenizer.encode("".join(names)).ids == ids
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    stops = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert ids[0] == config["eos_token_id"]
    assert {ids[0], ids[4]} <= set(stops)


def test_chat_template_is_that_of_phi(tokenizer):
    template = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    assert (
        template
        == json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    )
    for name in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"):
        assert name in template
