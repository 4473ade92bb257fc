"""A tiny checkpoint of Phi-3.5-vision's exact structure with random weights, and what torch makes of it.

    python -m tests.vision.checkpoint FOLDER    write one, and an image next to it

transformers has no such model, so the reference is put together from its parts: CLIP, Phi-3, and the publisher's
way from one to the other, written down plainly.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from tests.architectures import families

WIDE, SIDE, PATCH, LAYERS, HEADS = 32, 336, 14, 3, 4
SWITCH = 1024
CLIP = {
    "hidden_size": WIDE,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\\n' -}}{% endif %}"
)


@dataclass
class Reference:
    """The parts of the model in torch, float32."""

    clip: Any
    text: Any
    tensors: dict[str, torch.Tensor]

    @torch.no_grad()
    def features(self, pixels: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the features [tokens, H] of images, each [1 + crops, 3, side, side], of ``sizes`` in pixels."""
        found = []
        row_end, view_end = self.tensors["sub_GN"].reshape(1, 1, -1), self.tensors["glb_GN"].reshape(1, -1)
        for views, (height, width) in zip(pixels, sizes, strict=True):
            seen = self.clip(views, output_hidden_states=True).hidden_states[-2][:, 1:]
            n, side = len(views), SIDE // PATCH
            merged = seen.reshape(n, side // 2, 2, side // 2, 2, WIDE).permute(0, 1, 3, 2, 4, 5)
            merged = merged.reshape(n, side // 2, side // 2, 4 * WIDE)
            high, wide = height // SIDE, width // SIDE
            crops = merged[1:].reshape(high, wide, side // 2, side // 2, 4 * WIDE).permute(0, 2, 1, 3, 4)
            crops = crops.reshape(high * side // 2, wide * side // 2, 4 * WIDE)

            def ended(grid: torch.Tensor) -> torch.Tensor:
                return torch.cat([grid, row_end.expand(len(grid), 1, -1)], dim=1).reshape(-1, 4 * WIDE)

            found += [ended(crops), view_end, ended(merged[0])]
        x = torch.cat(found)
        t = self.tensors
        x = torch.nn.functional.linear(x, t["img_projection.0.weight"], t["img_projection.0.bias"])
        x = torch.nn.functional.gelu(x)
        return torch.nn.functional.linear(x, t["img_projection.2.weight"], t["img_projection.2.bias"])

    @torch.no_grad()
    def embeds(self, ids: Sequence[int], features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [1, S, H] of ``ids``, of which negative ones take ``features`` in order."""
        given = torch.tensor([ids])
        found = self.text.get_input_embeddings()(given.clamp(min=0))
        found[given < 0] = features
        return found

    @torch.no_grad()
    def logits(self, ids: Sequence[int], features: torch.Tensor) -> torch.Tensor:
        """Return the logits [S, V] of ``ids``."""
        return self.text(inputs_embeds=self.embeds(ids, features)).logits[0]

    def greedy(self, ids: Sequence[int], features: torch.Tensor, count: int) -> list[int]:
        """Return the ``count`` most likely tokens after ``ids``, everything computed again for each."""
        row = list(ids)
        for _ in range(count):
            row.append(int(self.logits(row, features)[-1].argmax()))
        return row[len(ids) :]


def save(folder: Path, *, seed: int = 0, crops: int = 4) -> Reference:
    """Write the checkpoint into ``folder`` and return the same in torch."""
    folder.mkdir(parents=True, exist_ok=True)
    values = families.sizes(num_key_value_heads=4, max_position_embeddings=8192)
    rope = families.longrope(8) | {"original_max_position_embeddings": SWITCH}
    config = Phi3Config(**values, rope_parameters=rope, original_max_position_embeddings=SWITCH)
    text = Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    families.randomize(text, seed=seed)
    vision = CLIPVisionConfig(**CLIP, image_size=SIDE, patch_size=PATCH, hidden_act="quick_gelu")
    clip = CLIPVisionModel(vision).eval()
    generator = torch.Generator().manual_seed(seed + 1)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, weight in clip.named_parameters():
            if "norm" in name or "layrnorm" in name:
                weight.copy_(random(*weight.shape, scale=0.2) + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith("bias"):
                weight.copy_(random(*weight.shape, scale=0.2))
            else:
                inputs = weight[0].numel() if weight.ndim > 1 else 1
                weight.copy_(random(*weight.shape, scale=1.5 / inputs**0.5))
    hidden, merged = values["hidden_size"], 4 * WIDE
    tensors = {
        "glb_GN": random(1, 1, merged),
        "sub_GN": random(1, 1, 1, merged),
        "img_projection.0.weight": random(hidden, merged, scale=1.5 / merged**0.5),
        "img_projection.0.bias": random(hidden, scale=0.2),
        "img_projection.2.weight": random(hidden, hidden, scale=1.0 / hidden**0.5),
        "img_projection.2.bias": random(hidden, scale=0.2),
    }
    at = "model.vision_embed_tokens"
    state = {k: v.detach().clone().contiguous() for k, v in text.state_dict().items()}
    for name, weight in clip.state_dict().items():
        plain = name.removeprefix("vision_model.")
        if not plain.endswith("position_ids"):
            state[f"{at}.img_processor.vision_model.{plain}"] = weight.clone().contiguous()
    state |= {f"{at}.{name}": weight for name, weight in tensors.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    saved = families.old_keys(json.loads(config.to_json_string(use_diff=False)))
    saved |= {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "torch_dtype": "float32",
        "eos_token_id": families.SPECIAL.index("</s>"),
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {
            "image_dim_out": WIDE,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
            **CLIP,
        },
    }
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    processor = {
        "image_processor_type": "Phi3VImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "num_crops": crops,
        "num_img_tokens": 144,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    families.save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}, indent=2))
    return Reference(clip, text, tensors)


if __name__ == "__main__":
    from PIL import Image

    save(Path(sys.argv[1]))
    Image.linear_gradient("L").resize((640, 480)).save(Path(sys.argv[1]) / "image.png")
