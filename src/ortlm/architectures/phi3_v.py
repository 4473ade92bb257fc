"""Phi-3-vision and Phi-3.5-vision: Phi-3 that reads images through CLIP, whole and in crops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import phi3
from ortlm.architectures._config import Config
from ortlm.architectures._parts import VISION_LAYER, check_colors
from ortlm.spec import (
    MLP,
    Architecture,
    Encoder,
    ImagePrompt,
    Norm,
    Source,
    Sources,
    Tiles,
    Vision,
    vision_parameters,
)

MODEL_TYPES = ("phi3_v",)

_AT = "model.vision_embed_tokens"
_CLIP = f"{_AT}.img_processor.vision_model"
_NAMES = {
    "class.weight": f"{_CLIP}.embeddings.class_embedding",
    "patches.weight": f"{_CLIP}.embeddings.patch_embedding.weight",
    "positions.weight": f"{_CLIP}.embeddings.position_embedding.weight",
    "pre_norm.weight": f"{_CLIP}.pre_layrnorm.weight",
    "pre_norm.bias": f"{_CLIP}.pre_layrnorm.bias",
    "row_end.weight": f"{_AT}.sub_GN",
    "view_end.weight": f"{_AT}.glb_GN",
    "join1.weight": f"{_AT}.img_projection.0.weight",
    "join1.bias": f"{_AT}.img_projection.0.bias",
    "join2.weight": f"{_AT}.img_projection.2.weight",
    "join2.bias": f"{_AT}.img_projection.2.bias",
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Phi-3-vision or Phi-3.5-vision checkpoint."""
    c = Config(config)
    text = phi3.describe(config)
    _check_projector(c)
    encoder, layers = _encoder(c)
    vision = Vision(
        encoder=encoder,
        projector=Tiles(merge=2, act="gelu"),
        prompt=ImagePrompt(tag="<|image_{}|>", separate=True),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        crops=4,
    )
    unused = tuple(f"{_CLIP}.encoder.layers.{i}.*" for i in range(encoder.layers, layers))
    return replace(
        text,
        vision=vision,
        sources={**text.sources, **_sources(vision, encoder, text.decoder.hidden)},
        genai_type="phi3v",
        ignored=(*text.ignored, *unused, f"{_CLIP}.post_layernorm.*", "*.position_ids", f"{_AT}.wte.weight"),
        # Fine-tunes drop a prefix that a newer CLIP does without, or keep the embeddings in another place.
        renamed=(
            *text.renamed,
            (f"{_CLIP}.", f"{_AT}.img_processor."),
            ("model.embed_tokens.", f"{_AT}.wte."),
        ),
    )


def _check_projector(c: Config) -> None:
    projector = c.part("embd_layer")
    if projector is None:
        return
    for key, wanted in (
        ("hd_transform_order", "sub_glb"),
        ("projection_cls", "mlp"),
        ("embedding_cls", "image"),
    ):
        if projector.text(key, wanted) != wanted:
            raise projector.wrong(key, repr(wanted))
    for key in ("use_hd_transform", "with_learnable_separator"):
        if not projector.flag(key, True):
            raise projector.wrong(key, "true")


def _encoder(c: Config) -> tuple[Encoder, int]:
    """Return the vision encoder as far as it is run, and how many layers the checkpoint has.

    The sizes stand in the publisher's code; a checkpoint of other sizes names them in ``img_processor``, as
    CLIP's configuration does.
    """
    p = c.part("img_processor") or Config({}, at=f"{c.at}: img_processor")
    p.ignore("name", "model_name", "num_img_tokens", "projection_dim")
    check_colors(p)
    if p.text("type_feature", "patch") != "patch":
        raise p.wrong("type_feature", "'patch'")
    hidden = p.integer("image_dim_out", p.integer("hidden_size", 1024))
    layers = p.integer("num_hidden_layers", 24)
    # Which of the vision encoder's states is taken; the first one is what goes into layer 0.
    index = p.integer("layer_idx", -2, least=-layers)
    run = index if index >= 0 else layers + 1 + index
    if not 1 <= run <= layers:
        raise p.wrong("layer_idx", f"a layer's number from 1 to {layers}, or from -{layers} to -1")
    encoder = Encoder(
        side=p.integer("image_size", 336),
        patch=p.integer("patch_size", 14),
        hidden=hidden,
        heads=p.integer("num_attention_heads", max(1, hidden // 64)),
        layers=run,
        ffn=MLP(
            p.integer("intermediate_size", 4 * hidden), p.activation("hidden_act", "quick_gelu"), bias=True
        ),
        norm=Norm(p.positive("layer_norm_eps", 1e-5, most=1.0), kind="layer", bias=True),
        class_token=True,
        pre_norm=True,
    )
    if hidden % encoder.heads:
        raise p.wrong("num_attention_heads", f"a divisor of the vision encoder's {hidden} channels")
    if encoder.side % (2 * encoder.patch):
        raise p.wrong("image_size", f"a multiple of two patches of {encoder.patch} pixels")
    return encoder, layers


def _sources(vision: Vision, encoder: Encoder, hidden: int) -> Sources:
    merged = 4 * encoder.hidden
    # The others lie as they are used.
    shapes = {
        "patches": (encoder.hidden, 3, encoder.patch, encoder.patch),
        "row_end": (1, 1, 1, merged),
        "view_end": (1, 1, merged),
    }
    sources: Sources = {}
    for p in vision_parameters(vision, hidden):
        if p.layer is not None:
            source = Source(f"{_CLIP}.encoder.layers.{p.layer}.{VISION_LAYER[p.part]}.{p.kind}")
        else:
            source = Source(_NAMES[f"{p.part}.{p.kind}"], stored=shapes.get(p.part))
        sources[p.name] = source
    return sources
