"""Phi-4-multimodal: Phi-4-mini, with images if the build has the adapter for them; speech is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import phi3
from ortlm.architectures._config import Config
from ortlm.architectures._parts import VISION_LAYER, check_colors
from ortlm.architectures._text_part import text_only
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

MODEL_TYPES = ("phi4_multimodal", "phi4mm")

_ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")
_AT = "model.embed_tokens_extend.image_embed"
_SIGLIP = f"{_AT}.img_processor"
_ENCODER = {
    "patches.weight": f"{_SIGLIP}.embeddings.patch_embedding.weight",
    "patches.bias": f"{_SIGLIP}.embeddings.patch_embedding.bias",
    "positions.weight": f"{_SIGLIP}.embeddings.position_embedding.weight",
}
_PROJECTOR = {"row_end": "sub_img_feature_extensor", "view_end": "global_img_feature_extensor"}
_PROJECTOR |= {"join1": "img_projection_up", "join2": "img_projection_down"}
_PUBLISHED = {
    "row_end": "sub_GN",
    "view_end": "glb_GN",
    "join1": "img_projection.0",
    "join2": "img_projection.2",
}
_UNREAD = (f"{_SIGLIP}.post_layernorm.*", f"{_SIGLIP}.head.*", "*.position_ids")
_AUDIO = ("model.embed_tokens_extend.audio_embed.*",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of the text decoder; ``phi4mm`` is what the publisher's own code calls it.

    In ``seeing`` it has images, which need the adapter for them.
    """
    c = Config(config)
    c.ignore("audio_config", "audio_processor", "vision_lora", "speech_lora")
    published = c.text("model_type") != "phi4_multimodal"
    text = phi3.describe(config)
    encoder, layers, token = _encoder(c)
    _check_projector(c)
    if published:
        sources = {name: _base(name, source) for name, source in text.sources.items()}
        text = replace(text, sources=sources, ignored=(*text.ignored, "*.lora_A.*", "*.lora_B.*"))
    note = (
        'Images need the adapter for them: --adapter vision=FOLDER, "vision-lora" of the publisher\'s files.'
    )
    alone = text_only(text)
    vision = Vision(
        encoder=encoder,
        projector=Tiles(merge=2, act="gelu", mean=True),
        # The publisher's own code has numbered tags, which transformers' template writes as the token itself.
        prompt=ImagePrompt(
            tag="<|image_{}|>" if published else "<|image|>",
            token="<|endoftext10|>" if published else "<|image|>",
            tag_end="",
        ),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crops=36,
        token=token,
        adapter="vision",
    )
    unused = tuple(f"{_SIGLIP}.encoder.layers.{i}.*" for i in range(encoder.layers, layers))
    seeing = replace(
        text,
        vision=vision,
        sources={**text.sources, **_sources(vision, encoder, text.decoder.hidden, published=published)},
        genai_type="phi3v",
        ignored=(*text.ignored, *unused, *_UNREAD, *_AUDIO),
        notes=(*text.notes, "The encoder of speech, and the adapter for it, are left out."),
    )
    return replace(alone, notes=(*alone.notes, note), seeing=seeing)


def _base(name: str, source: Source) -> Source:
    """Return where a matrix lies next to its adapters."""
    if name.split(".")[-2] not in _ADAPTED:
        return source
    return replace(source, tensor=f"{source.tensor.removesuffix('.weight')}.base_layer.weight")


def _check_projector(c: Config) -> None:
    c.ignore("img_processor")
    outer = c.part("embd_layer")
    p = outer.part("image_embd_layer") if outer is not None else None
    if outer is not None:
        outer.ignore("audio_embd_layer", "embedding_cls")
    if p is None:
        return
    p.ignore("crop_size", "enable_gradient_checkpointing")
    for key, wanted in (
        ("embedding_cls", "tune_image"),
        ("hd_transform_order", "sub_glb"),
        ("image_token_compression_cls", "avg_pool_2d"),
        ("projection_cls", "mlp"),
    ):
        if p.text(key, wanted) != wanted:
            raise p.wrong(key, repr(wanted))
    for key in ("use_hd_transform", "with_learnable_separator"):
        if not p.flag(key, True):
            raise p.wrong(key, "true")


def _encoder(c: Config) -> tuple[Encoder, int, int]:
    """Return the vision encoder as far as it is run, how many layers the checkpoint has, and the images' token.

    The publisher's configuration has none of the sizes, which are in the code.
    """
    p = c.part("vision_config") or Config({}, at=f"{c.at}: vision_config")
    check_colors(p)
    hidden, layers = p.integer("hidden_size", 1152), p.integer("num_hidden_layers", 27)
    index = p.integer("feature_layer", -2, least=-layers)
    run = index if index >= 0 else layers + 1 + index
    if not 1 <= run <= layers:
        raise p.wrong("feature_layer", f"a layer's number from 1 to {layers}, or from -{layers} to -1")
    encoder = Encoder(
        side=p.integer("image_size", 448),
        patch=p.integer("patch_size", 14),
        hidden=hidden,
        heads=p.integer("num_attention_heads", 16),
        layers=run,
        ffn=MLP(
            p.integer("intermediate_size", 4304), p.activation("hidden_act", "gelu_pytorch_tanh"), bias=True
        ),
        norm=Norm(p.positive("layer_norm_eps", 1e-6, most=1.0), kind="layer", bias=True),
        patch_bias=True,
        padded=True,
    )
    if hidden % encoder.heads:
        raise p.wrong("num_attention_heads", f"a divisor of the vision encoder's {hidden} channels")
    if encoder.side % (2 * encoder.patch):
        raise p.wrong("image_size", f"a multiple of two patches of {encoder.patch} pixels")
    if p.integer("crop_size", encoder.side) != encoder.side:
        raise p.wrong("crop_size", f'the same as "image_size" ({encoder.side})')
    return encoder, layers, p.integer("image_token_id", 200_010)


def _sources(vision: Vision, encoder: Encoder, hidden: int, *, published: bool) -> Sources:
    wide, names = encoder.hidden, _PUBLISHED if published else _PROJECTOR
    # The others lie as they are used.
    shapes = {
        "patches.weight": (wide, 3, encoder.patch, encoder.patch),
        "row_end.weight": (1, 1, 1, wide),
        "view_end.weight": (1, 1, wide),
    }
    sources: Sources = {}
    for p in vision_parameters(vision, hidden):
        name = f"{p.part}.{p.kind}"
        if p.layer is not None:
            source = Source(f"{_SIGLIP}.encoder.layers.{p.layer}.{VISION_LAYER[p.part]}.{p.kind}")
        else:
            ends = "" if p.part in ("row_end", "view_end") else f".{p.kind}"
            tensor = _ENCODER.get(name) or f"{_AT}.{names[p.part]}{ends}"
            source = Source(tensor, stored=shapes.get(name))
        sources[p.name] = source
    return sources
