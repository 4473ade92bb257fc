"""Folders made by the official builder: the same greedy tokens here and in onnxruntime-genai."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import ortlm
from tests import official
from tests.architectures import oracle
from tests.runtime import tiny

builder = pytest.importorskip("onnxruntime_genai.models.builder")

STEPS = 48
# Without ids that have no token: the official runtime would take them.
SIZES = {
    "vocab_size": tiny.byte_level().get_vocab_size(),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MODELS: dict[str, Any] = {
    "phi3": transformers.Phi3Config(**SIZES, original_max_position_embeddings=256),
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    # A window of 16 in all layers but the last.
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=16, query_pre_attn_scalar=32,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    ),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
}  # fmt: skip
WINDOWED = {
    # Wider than the room that a cache begins with.
    "gemma3-wide": transformers.Gemma3TextConfig(
        **SIZES | {"max_position_embeddings": 512}, head_dim=32, sliding_window=300, query_pre_attn_scalar=32,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    ),
    "mistral-window": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=96),
}  # fmt: skip


class Gemma3(builder.Gemma3Model):  # type: ignore[misc, name-defined]
    """The builder expects transformers 4's rope settings; with those of version 5 it fails."""

    def __init__(self, config: Any, *rest: Any) -> None:
        config.rope_theta, config.rope_local_base_freq = 1_000_000.0, 10_000.0
        super().__init__(config, *rest)

    def make_rope_init(self, config: Any) -> None:
        """Do nothing: there is no scaling."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a name to its transformers model and to the folder of a precision."""
    models: dict[str, Any] = {}

    def get(name: str, precision: str, **options: str) -> tuple[Any, Path]:
        if name not in models:
            models[name] = _checkpoint(
                {**MODELS, **WINDOWED}[name], tmp_path_factory.mktemp("official") / name
            )
        model, folder = models[name]
        out = folder.parent / f"{name}-{precision}-{'-'.join(options)}"
        if not out.is_dir():
            _build(folder, out, precision, options)
        return model, out

    return get


def _checkpoint(config: Any, folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    model.save_pretrained(folder)
    tiny.save(
        folder, tiny.byte_level(), tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>",
        chat_template=tiny.TEMPLATES["phi-4-mini"],
    )  # fmt: skip
    return model, folder


def _build(folder: Path, out: Path, precision: str, options: dict[str, str]) -> None:
    where = ("", str(folder), str(out), precision, "cpu", str(out.parent / "cache"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(builder, "Gemma3Model", Gemma3)
        builder.create_model(
            *where, **builder.parse_extra_options(*where, [f"{k}={v}" for k, v in options.items()])
        )


def _greedy(folder: Path, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    generator = ortlm.load(folder, threads=1).generator(max_new_tokens=STEPS, min_new_tokens=STEPS)
    generator.append(prompt)
    logits = []
    while not generator.done:
        logits.append(generator.logits[0])
        generator.step()
    return generator.sequence()[len(prompt) :], np.array(logits)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name: str, precision: str, made: Any) -> None:
    """48 tokens after 24: well beyond Gemma's window."""
    model, folder = made(name, precision)
    prompt = oracle.random_tokens(24)
    tokens, logits = _greedy(folder, prompt)
    assert tokens == official.greedy(folder, prompt, steps=STEPS)
    if precision == "fp32":
        want = oracle.prompt_logits(model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        assert oracle.relative_error(logits, want) < 1e-4


@pytest.mark.parametrize(
    "options", [{"prune_lm_head": "true"}, {"include_hidden_states": "true"}, {"is_symmetric": "false"}]
)
def test_variants(options: dict[str, str], made: Any) -> None:
    _, folder = made("llama", "int4", **options)
    prompt = oracle.random_tokens(24)
    assert _greedy(folder, prompt)[0] == official.greedy(folder, prompt, steps=STEPS)
    lm = ortlm.load(folder, threads=1)
    if "include_hidden_states" in options:
        assert lm.embed([prompt]).shape == (1, SIZES["hidden_size"])
    if "prune_lm_head" in options:
        with pytest.raises(ortlm.errors.BadOption, match="last token only"):
            lm.generate(prompt, draft="lookup")
    else:
        drafted = lm.generate(prompt * 2, max_new_tokens=20, draft="lookup")
        assert drafted.token_ids == lm.generate(prompt * 2, max_new_tokens=20).token_ids


def test_without_a_shared_buffer(made: Any, tmp_path: Path) -> None:
    """Each step gets and returns new tensors."""
    _, folder = made("qwen3", "fp32")
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"]["past_present_share_buffer"] = False
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    prompt = oracle.random_tokens(24)
    assert _greedy(tmp_path, prompt)[0] == official.greedy(tmp_path, prompt, steps=STEPS)


@pytest.mark.parametrize("name", ["phi3", "gemma3"])
def test_a_conversation_of_several_rows(name: str, made: Any) -> None:
    """Rows of different lengths, appended to and taken back, although the graph knows no lengths per row."""
    model, folder = made(name, "fp32")
    generator = ortlm.load(folder, threads=1).generator(min_new_tokens=50)
    generator.append([oracle.random_tokens(n, seed=n) for n in (5, 23)])
    for _ in range(4):
        generator.step()
    generator.append([oracle.random_tokens(9, seed=1), []])
    generator.step()
    generator.rewind([12, 26])
    generator.append([oracle.random_tokens(2, seed=2), oracle.random_tokens(3, seed=3)])
    for row, logits in enumerate(generator.logits):
        want = oracle.prompt_logits(model, generator.sequence(row))[-1]
        assert oracle.relative_error(logits, want) < 1e-4


def test_a_window_wider_than_the_prompt(made: Any) -> None:
    """Attention that drops old positions itself refuses a buffer that is smaller than its window."""
    model, folder = made("gemma3-wide", "fp32")
    lm, tokens = ortlm.load(folder, threads=1), oracle.random_tokens(400)
    want = oracle.prompt_logits(model, tokens)
    assert oracle.relative_error(lm.logits(tokens[:10]), want[:10]) < 1e-4
    got = lm.logits_batch([tokens[:290]], [tokens[290:]])[0]
    assert oracle.relative_error(got, want[289:]) < 1e-4


def test_going_back_past_the_window(made: Any) -> None:
    model, folder = made("gemma3", "fp32")
    tokens = oracle.random_tokens(120)
    loop = ortlm.load(folder, threads=1).loop()
    loop.start()
    loop.append([tokens])
    loop.trim(20)
    got = loop.append([tokens[90:]])[0]
    want = oracle.prompt_logits(model, [*tokens[:20], *tokens[90:]])[-1]
    assert oracle.relative_error(got, want) < 1e-4


@pytest.mark.parametrize(
    ("name", "precision", "reach"), [("mistral-window", "fp32", 96), ("gemma3", "fp16", 16)]
)
def test_a_window_that_the_graph_does_not_apply_ends_the_context(
    name: str, precision: str, reach: int, made: Any
) -> None:
    model, folder = made(name, precision)
    lm, tokens = ortlm.load(folder, threads=1), oracle.random_tokens(reach)
    error = oracle.relative_error(lm.logits(tokens), oracle.prompt_logits(model, tokens))
    assert error < (2e-2 if precision == "fp16" else 1e-4)
    with pytest.raises(ortlm.errors.ContextFull, match=f"holds {reach}"):
        lm.logits([*tokens, 5])
