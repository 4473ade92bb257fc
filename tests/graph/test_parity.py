"""Every architecture against transformers in float32, and the same folder in the official runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.quant.rtn import dequantize, rtn
from ortlm.quant.scheme import Scheme
from tests import official
from tests.architectures import families, oracle

TOLERANCE = 1e-4
PROMPT, STEPS = 24, 64
# Ends of text and of turn in the tiny tokenizer; the official runtime cannot be told to ignore them.
ENDS = (2, 6)

Saved = Any
Build = Callable[..., ortlm.LanguageModel]


def greedy(
    lm: ortlm.LanguageModel, prompt: list[int], *, steps: int, banned: tuple[int, ...] = ()
) -> list[int]:
    loop = lm.loop()
    loop.start()
    logits, tokens = loop.append([prompt]), []
    for _ in range(steps):
        logits[:, list(banned)] = -np.inf
        tokens.append(int(logits[0].argmax()))
        logits = loop.step(np.array(tokens[-1:]))
    return tokens


@pytest.mark.parametrize("name", families.FAMILIES)
def test_prompt_and_decode(name: str, saved: Saved, build: Build) -> None:
    """120 tokens: past every window (8) and past the longrope switch (64)."""
    model, lm = saved(name).model, build(name)
    tokens = oracle.random_tokens(120)
    want = oracle.prompt_logits(model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < TOLERANCE
    want = oracle.decode_logits(model, tokens, prompt=PROMPT)[PROMPT - 1 :]
    got = lm.logits_batch([tokens[:PROMPT]], [tokens[PROMPT:]])[0]
    assert oracle.relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("lengths", [(17, 5, 30), (70, 66, 90)], ids=["short", "past-the-switch"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_ragged_batch(name: str, lengths: tuple[int, ...], saved: Saved, build: Build) -> None:
    """Rows of different lengths, each as if it were alone."""
    model, lm = saved(name).model, build(name)
    more = 12
    rows = [oracle.random_tokens(n + more, seed=n) for n in lengths]
    got = lm.logits_batch(
        [row[:n] for row, n in zip(rows, lengths, strict=True)],
        [row[n:] for row, n in zip(rows, lengths, strict=True)],
    )
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        want = oracle.prompt_logits(model, row)[n - 1 :]
        assert oracle.relative_error(got[i], want) < TOLERANCE


@pytest.mark.parametrize("name", families.FAMILIES)
def test_ragged_append(name: str, saved: Saved, build: Build) -> None:
    """Several tokens at once, a different number for each row, after different pasts."""
    model, lm = saved(name).model, build(name)
    first, then = (9, 3, 14), (4, 11, 1)
    rows = [oracle.random_tokens(a + b, seed=a) for a, b in zip(first, then, strict=True)]
    loop = lm.loop()
    loop.start(len(rows))
    loop.append([row[:a] for row, a in zip(rows, first, strict=True)])
    got = loop.append([row[a:] for row, a in zip(rows, first, strict=True)], keep=max(then))
    last = loop.step(np.array([5, 6, 7]))
    for i, (row, a, b) in enumerate(zip(rows, first, then, strict=True)):
        want = oracle.prompt_logits(model, [*row, 5 + i])[a:]
        assert oracle.relative_error(got[i, -b:], want[:-1]) < TOLERANCE
        assert oracle.relative_error(last[i], want[-1]) < TOLERANCE


@pytest.mark.parametrize("name", families.FAMILIES)
def test_greedy(name: str, saved: Saved, build: Build) -> None:
    prompt = oracle.random_tokens(PROMPT)
    assert greedy(build(name), prompt, steps=STEPS) == oracle.greedy(saved(name).model, prompt, steps=STEPS)


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in families.NOT_OFFICIAL])
def test_official_runtime(name: str, saved: Saved, build: Build) -> None:
    """The folder as it is, loaded in onnxruntime-genai, chooses the tokens that transformers chooses."""
    model, lm = saved(name).model, build(name)
    prompt = oracle.random_tokens(PROMPT)
    ids = torch.tensor([prompt])
    want = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        eos_token_id=list(ENDS),
        pad_token_id=0,
        do_sample=False,
    )[0, PROMPT:].tolist()
    # The official runtime recomputes at 4097 tokens, whatever config.json says; see test_official_switch.
    steps = STEPS if lm.manifest.rope_switch_tokens is None else lm.manifest.rope_switch_tokens - PROMPT
    assert official.greedy(lm.artifact.path, prompt, steps=steps) == want[:steps]
    assert greedy(lm, prompt, steps=STEPS, banned=ENDS) == want


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_quantized_runs(name: str, precision: str, saved: Saved, build: Build) -> None:
    """Quantized folders run in both runtimes; int8 stays close even for random weights."""
    lm = build(name, precision)
    tokens = oracle.random_tokens(PROMPT)
    want = oracle.prompt_logits(saved(name).model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < (0.12 if precision == "int8" else 0.8)
    assert len(greedy(lm, tokens, steps=16)) == 16
    if name not in families.NOT_OFFICIAL:
        assert len(official.greedy(lm.artifact.path, tokens, steps=16)) == 16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", ["phi3", "qwen2-tied", "gemma2", "phi-2"])
def test_quantized_graph_is_exact(name: str, bits: int, symmetric: bool, saved: Saved, build: Build) -> None:
    """With float activations, a quantized graph computes exactly what its rounded weights say."""
    options = BuildOptions(
        bits=bits, head_bits=bits, embed_bits=bits, block_size=32, symmetric=symmetric, accuracy_level=1
    )
    lm = build(name, "int4", options)
    scheme = Scheme(bits=bits, block=32, symmetric=symmetric, scales="fp16")
    original = saved(name).model
    model = type(original)(original.config).eval()
    state = original.state_dict()
    rounded = {
        key: torch.from_numpy(
            dequantize(rtn(value.numpy(), scheme), scheme, value.shape[1]).astype(np.float32)
        )
        if value.ndim == 2
        else value
        for key, value in state.items()
    }
    model.load_state_dict(rounded)
    tokens = oracle.random_tokens(PROMPT)
    assert oracle.relative_error(lm.logits(tokens), oracle.prompt_logits(model, tokens)) < TOLERANCE


def phi3_at_4096() -> Any:
    return families.Phi3Config(
        **families.sizes(
            num_hidden_layers=1,
            max_position_embeddings=8192,
            original_max_position_embeddings=4096,
            rope_parameters=families.longrope(8),
        )
    )


def phimoe_at_4096() -> Any:
    config = families.phimoe()
    config.num_hidden_layers = 1
    config.max_position_embeddings = 8192
    config.original_max_position_embeddings = 4096
    config.rope_parameters["original_max_position_embeddings"] = 4096
    return config


@pytest.mark.slow
@pytest.mark.parametrize("make", [phi3_at_4096, phimoe_at_4096])
def test_official_switch(make: Callable[[], Any], tmp_path: Path) -> None:
    """Across the switch of the Phi-3 family at 4096 tokens all three agree: transformers, ortlm, genai.

    For Phi-3.5-MoE, transformers has the rotation of ``families.PhimoeRotary``.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(make(), attn_implementation="eager", dtype=torch.float32).eval()
    families.randomize(model, seed=1)
    families.correct_rotation(model)
    model.save_pretrained(tmp_path / "checkpoint")
    families.save_tokenizer(tmp_path / "checkpoint")
    ortlm.build(tmp_path / "checkpoint", tmp_path / "out", precision="fp32")
    lm = ortlm.load(tmp_path / "out", threads=1)
    prompt = oracle.random_tokens(4090, seed=3)
    model.generation_config.eos_token_id = None
    want = oracle.greedy(model, prompt, steps=16)
    assert greedy(lm, prompt, steps=16) == want
    assert official.greedy(tmp_path / "out", prompt, steps=16) == want
    tokens = [*prompt, *want]
    assert oracle.relative_error(lm.logits(tokens), oracle.prompt_logits(model, tokens)) < TOLERANCE
