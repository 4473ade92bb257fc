"""A tiny Gemma 3 with images, random weights, and what transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.architectures import families

SIDE, TOKENS, WINDOW = 112, 16, 8
PLACE, BEGIN, END = 280, 281, 282
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save(folder: Path, *, hub_names: bool = False) -> Any:
    """Write the checkpoint into ``folder`` and return the torch model.

    ``hub_names``: with the prefixes and the sparse configuration of the checkpoints on the hub.
    """
    text = families.sizes(
        num_hidden_layers=4,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        sliding_window_pattern=3,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=TOKENS,
        image_token_index=PLACE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "embed_tokens" in name:
                weight.copy_(0.4 / weight.shape[1] ** 0.5 * noise)
            elif "norm" in name and weight.ndim == 1:
                language = "language_model" in name or "mm_soft" in name
                mean = 0.0 if language or name.endswith("bias") else 1.0
                weight.copy_(mean + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.2 * noise)
            else:
                inputs = weight.shape[0] if "input_projection" in name else weight[0].numel()
                weight.copy_(1.5 / inputs**0.5 * noise)
    model.generation_config.eos_token_id = [families.SPECIAL.index("</s>"), families.SPECIAL.index("<|end|>")]
    model.save_pretrained(folder)
    made = families.tokenizer()
    for token, place in (("<image_soft_token>", PLACE), ("<start_of_image>", BEGIN), ("<end_of_image>", END)):
        while made.get_vocab_size() < place:
            made.add_tokens([f"<unused{made.get_vocab_size()}>"])
        made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
    families.save_tokenizer(folder)
    made.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}, indent=2))
    if hub_names:
        _as_on_the_hub(folder)
    return model


def _as_on_the_hub(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def logits(model: Any, ids: Sequence[int], pixels: Any) -> torch.Tensor:
    """Return transformers' logits [S, V]; ``ids`` have PLACE for the tokens of images, ``pixels`` [n, 3, …]."""
    given = torch.tensor([ids])
    seen = {"pixel_values": torch.from_numpy(pixels)} if len(pixels) else {}
    types = (given == PLACE).long()
    found: torch.Tensor = model(input_ids=given, token_type_ids=types, **seen).logits[0]
    return found
