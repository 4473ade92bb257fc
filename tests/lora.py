"""Random LoRA adapters for the tiny models, saved by peft, which is the oracle too."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch

# Name to (row of families, configuration of peft).
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "some-parts": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "attention-out": ("llama", {"r": 3, "lora_alpha": 9, "target_modules": ["o_proj"]}),
    "fused": ("phi3", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "fused-qkv": ("phi3", {"r": 5, "lora_alpha": 3, "target_modules": ["qkv_proj"]}),
    "biases": ("qwen2", {"r": 2, "lora_alpha": 4, "target_modules": r".*\.(k_proj|v_proj|gate_proj|o_proj)"}),
    "one-layer": ("qwen2", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "patterns": (
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"up_proj": 11},
        },
    ),
    "parallel": ("phi-2", {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "dense", "fc1", "fc2"]}),
    "head": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head", "k_proj"]}),
    "tied-head": ("qwen2-tied", {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head", "down_proj"]}),
    "scaled-tied-head": ("granite", {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head"]}),
}  # fmt: skip


def save(model: Any, folder: Path, *, seed: int = 1, **config: Any) -> Any:
    """Write a random adapter for ``model`` to ``folder`` and return the adapted model; ``model`` stays itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * (0.7 / weight.shape[1] ** 0.5))
    with warnings.catch_warnings():
        # A LoRA on the head makes peft save the head too.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        adapted.save_pretrained(folder)
    return adapted
