"""A tiny Phi-4-multimodal with random weights, its adapter for images, and what transformers makes of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from tests.architectures import families

SIDE, PATCH, RANK, ALPHA = 448, 14, 4, 8
PLACE = 280
SWITCH = 4096
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PUBLISHED_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def config() -> Any:
    """Return the configuration, of 3 layers of the vision encoder of which 2 are run."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_token_id": PLACE, "image_size": SIDE, "patch_size": PATCH, "crop_size": SIDE,
    }  # fmt: skip
    audio = {
        "hidden_size": 32, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
        "audio_token_id": 281,
    }  # fmt: skip
    rope = families.longrope(8) | {"original_max_position_embeddings": SWITCH}
    sizes = families.sizes(
        max_position_embeddings=8192, original_max_position_embeddings=SWITCH, rope_parameters=rope
    )
    return Phi4MultimodalConfig(**sizes, vision_config=vision, audio_config=audio)


def save(folder: Path, *, published: bool = False) -> tuple[Any, Any]:
    """Write the checkpoint and its adapter into ``folder``; return the torch model without and with the adapter.

    ``published``: with the names of the publisher's own files.
    """
    plain, adapted = (
        Phi4MultimodalForCausalLM._from_config(config(), attn_implementation="eager").eval() for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and weight.ndim == 1:
                weight.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.2 * noise)
            elif "embed_tokens.weight" in name or "feature_extensor" in name:
                weight.copy_(noise)
            else:
                weight.copy_(1.5 / weight[0].numel() ** 0.5 * noise)
    plain.generation_config.eos_token_id = [families.SPECIAL.index("</s>"), families.SPECIAL.index("<|end|>")]
    plain.save_pretrained(folder)
    _save_adapter(folder / "vision-lora", plain, adapted, generator)
    _save_tokenizer(folder, published=published)
    (folder / "preprocessor_config.json").write_text(json.dumps({"dynamic_hd": 4}))
    if published:
        _as_published(folder)
    return plain, adapted


def _save_adapter(folder: Path, plain: Any, adapted: Any, generator: torch.Generator) -> None:
    state = dict(plain.state_dict())
    tensors = {}
    for name, weight in plain.state_dict().items():
        if "_proj.weight" not in name or not name.startswith("model.layers."):
            continue
        a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        b = torch.randn(weight.shape[0], RANK, generator=generator) / RANK**0.5
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        state[name] = weight + ALPHA / RANK * b @ a
    adapted.load_state_dict(state)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _save_tokenizer(folder: Path, *, published: bool) -> None:
    made = families.tokenizer()
    while made.get_vocab_size() < PLACE:
        made.add_tokens([f"<unused{made.get_vocab_size()}>"])
    token = "<|endoftext10|>" if published else "<|image|>"
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
    families.save_tokenizer(folder)
    made.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    template = PUBLISHED_TEMPLATE if published else TEMPLATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}, indent=2))


def _as_published(folder: Path) -> None:
    path = folder / "config.json"
    found = json.loads(path.read_text())
    rope = found.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    rope.pop("partial_rotary_factor", None)
    image = {"crop_size": SIDE, "embedding_cls": "tune_image", "image_token_compression_cls": "avg_pool_2d"}
    image |= {"hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True}
    found |= {"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"], "rope_theta": theta}
    found |= {"rope_scaling": rope | {"type": "longrope"}}
    found |= {"embd_layer": {"embedding_cls": "image_audio", "image_embd_layer": image}}
    found |= {"vision_lora": {"r": RANK}, "speech_lora": {"r": RANK}}
    path.write_text(json.dumps(found))
    names = {
        "global_img_feature_extensor": "glb_GN", "sub_img_feature_extensor": "sub_GN",
        "img_projection_up": "img_projection.0", "img_projection_down": "img_projection.2",
    }  # fmt: skip
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        new = name
        for old, other in names.items():
            new = new.replace(old, other)
        if "_proj.weight" in name and name.startswith("model.layers."):
            module = name.removesuffix(".weight")
            tensors |= {
                f"{module}.lora_A.{kind}.weight": torch.ones(RANK, weight.shape[1])
                for kind in ("vision", "speech")
            }
            new = f"{module}.base_layer.weight"
        tensors[new] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def inputs(
    ids: Sequence[int], seen: Sequence[tuple[Any, tuple[int, int], tuple[int, int]]]
) -> dict[str, torch.Tensor]:
    """Return transformers' inputs: ``ids`` have PLACE for the tokens of images.

    ``seen`` has pixels [views, 3, side, side] of each image, the (height, width) of its crops, and the rows and
    columns of patches that are no padding.
    """
    found = {"input_ids": torch.tensor([ids])}
    if not seen:
        return found
    grid, most = SIDE // PATCH, max(len(pixels) for pixels, *_ in seen)
    values = torch.zeros(len(seen), most, 3, SIDE, SIDE)
    masks = torch.ones(len(seen), most, grid, grid)
    for at, (pixels, (height, width), (rows, columns)) in enumerate(seen):
        values[at, : len(pixels)] = torch.from_numpy(pixels)
        mask = torch.zeros(height // PATCH, width // PATCH)
        mask[:rows, :columns] = 1
        crops = mask.reshape(height // SIDE, grid, width // SIDE, grid).transpose(1, 2)
        masks[at, 1 : len(pixels)] = crops.reshape(-1, grid, grid)
    sizes = torch.tensor([size for _, size, _ in seen])
    return found | {"image_pixel_values": values, "image_sizes": sizes, "image_attention_mask": masks}


@torch.no_grad()
def logits(model: Any, ids: Sequence[int], seen: Sequence[Any] = ()) -> torch.Tensor:
    """Return transformers' logits [S, V]."""
    found: torch.Tensor = model(**inputs(ids, seen)).logits[0]
    return found
