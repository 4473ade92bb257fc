"""Artifacts made by the official builder: what others publish must run too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from tests.runtime import fakes, tiny


def make_checkpoint(folder):
    """Write a tiny Llama whose vocabulary is larger than its tokenizer's, and return the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=352,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
        # Ids without a token would win if they were allowed to.
        model.lm_head.weight[330:] *= 3
    model.save_pretrained(folder)
    tokenizer = tiny.byte_level()
    tiny.save(
        folder,
        tokenizer,
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|end|>",
        chat_template=tiny.TEMPLATES["phi-4-mini"],
    )
    return model


@cache
def build_official(base):
    """Build once per run of pytest, whichever test module asks first."""
    pytest.importorskip("onnxruntime_genai")
    root = base / "official"
    model = make_checkpoint(root / "hf")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(root / "hf")]
    command += ["-o", str(root / "out"), "-p", "fp32", "-e", "cpu", "-c", str(root / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "out", model


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """Return (folder of an fp32 CPU artifact of the official builder, the torch model)."""
    return build_official(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def official_append(official, tmp_path_factory):
    """The same artifact, its configuration asking for a new cache tensor at each step."""
    folder = tmp_path_factory.mktemp("append")
    for path in official[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"]["past_present_share_buffer"] = False
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def pytest_generate_tests(metafunc):
    """Run every test of the fakes twice: over main memory, and over a device that copies what is bound."""
    if "FakeBackend" in vars(metafunc.module):
        metafunc.parametrize("fake_memory", ["host", "device"], indirect=True)


@pytest.fixture(autouse=True)
def fake_memory(request, monkeypatch):
    """Say where the fakes of a test keep their states; of itself, so that pytest does not pass it over."""
    monkeypatch.setattr(fakes.FakeBackend, "device", getattr(request, "param", "host") == "device")
