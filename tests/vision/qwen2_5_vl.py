"""A tiny Qwen2.5-VL with random weights, its processor, and what transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.architectures import families

START, END, IMAGE, VIDEO = 280, 281, 282, 283
TOKENS = {START: "<|vision_start|>", END: "<|vision_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
# So few pixels that a test is quick, and so many that there are several windows.
LEAST, MOST = 28 * 28 * 2, 28 * 28 * 40
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save(folder: Path, *, hub_names: bool = False) -> Any:
    """Write the checkpoint into ``folder`` and return the torch model.

    ``hub_names``: with the prefixes and the flat configuration of the checkpoints on the hub.
    """
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config=families.sizes(hidden_size=128, rope_parameters=rope),
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 128,
            "fullatt_block_indexes": [1], "window_size": 112,
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    families.randomize(model, seed=0)
    model.generation_config.eos_token_id = [families.SPECIAL.index("</s>"), families.SPECIAL.index("<|end|>")]
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    made = families.tokenizer()
    for place, token in TOKENS.items():
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


def processor() -> Any:
    """Return transformers' processor of images."""
    return Qwen2VLImageProcessorPil(min_pixels=LEAST, max_pixels=MOST)


def _as_on_the_hub(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    inner = config.pop("text_config")
    inner.pop("model_type", None)
    sections = inner.pop("rope_parameters")
    flat = {**config, **inner, "rope_theta": sections["rope_theta"], "model_type": "qwen2_5_vl"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": sections["mrope_section"]}
    flat["vision_config"] = {
        key: value
        for key, value in config["vision_config"].items()
        if key not in ("rope_parameters", "in_channels")
    } | {"in_chans": 3, "spatial_patch_size": 14}
    path.write_text(json.dumps(flat))
    settings = {
        "min_pixels": LEAST,
        "max_pixels": MOST,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_processor_type": "Qwen2VLImageProcessor"})
    )


def inputs(ids: Sequence[int], images: Sequence[Any]) -> dict[str, Any]:
    """Return what the torch model takes; ``ids`` have IMAGE for the tokens of images."""
    given = torch.tensor([list(ids)])
    seen = dict(processor()(images=list(images), return_tensors="pt")) if images else {}
    return {"input_ids": given, "mm_token_type_ids": (given == IMAGE).int(), **seen}


@torch.no_grad()
def logits(model: Any, ids: Sequence[int], images: Sequence[Any]) -> torch.Tensor:
    """Return transformers' logits [S, V]."""
    # What an earlier call has left says nothing of this one.
    model.model.rope_deltas = None
    found: torch.Tensor = model(**inputs(ids, images)).logits[0]
    return found


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], images: Sequence[Any], steps: int) -> list[int]:
    """Return the most likely tokens after ``ids``."""
    model.model.rope_deltas = None
    given = inputs(ids, images)
    made = model.generate(**given, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return list(made[0, len(ids) :].tolist())
