"""Qwen2.5-VL: Qwen2 that reads images of any size, patch by patch, and knows where in them each token is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._rope import from_parts, keys_of
from ortlm.architectures._text_part import text_part
from ortlm.architectures.qwen_vl import decoder_with_one_position
from ortlm.spec import (
    Architecture,
    Attention,
    Decoder,
    GatedMLP,
    ImagePrompt,
    Merged,
    Norm,
    Source,
    Sources,
    Vision,
    WindowedEncoder,
    vision_parameters,
)

MODEL_TYPES = ("qwen2_5_vl",)

# Written into the publisher's code, for all norms of the vision encoder and the projector.
_NORM = Norm(1e-6)
_LAYER = {
    "mixer_pre": "norm1",
    "o": "attn.proj",
    "ffn_pre": "norm2",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_OTHERS = {
    "patches": "visual.patch_embed.proj",
    "join_norm": "visual.merger.ln_q",
    "join1": "visual.merger.mlp.0",
    "join2": "visual.merger.mlp.2",
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Qwen2.5-VL checkpoint."""
    c = Config(config)
    text = decoder_with_one_position(config)
    encoder = _encoder(c, text.decoder.hidden)
    vision = Vision(
        encoder=encoder,
        projector=Merged(_NORM, act="gelu"),
        prompt=ImagePrompt(tag="<|image_pad|>", token="<|image_pad|>"),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        token=c.integer("image_token_id", 151_655),
        start=c.integer("vision_start_token_id", 151_652),
        pixels=(56 * 56, 28 * 28 * 1280),
    )
    return replace(
        text,
        decoder=_with_axes(text.decoder, config),
        vision=vision,
        sources={**text.sources, **_sources(vision, encoder, text.decoder.hidden)},
        genai_type="qwen2_5_vl",
        # transformers 5 has another prefix than the checkpoints on the hub.
        renamed=(*text.renamed, ("visual.", "model.visual.")),
    )


def _with_axes(decoder: Decoder, config: Mapping[str, Any]) -> Decoder:
    """Return ``decoder`` whose frequencies go with time, row and column by the sections of ``config.json``."""
    keys = keys_of(text_part(config, tied=False)[0])
    pairs = next(decoder.attentions).head_dim // 2
    sections = keys.indices("mrope_section") or [16, 24, 24]
    if sum(sections) != pairs:
        raise keys.wrong("mrope_section", f"numbers whose sum is {pairs}, half of a head's channels")
    axes = tuple(i % 3 for i, count in enumerate(sections) for _ in range(count))
    layers = []
    for layer in decoder.layers:
        assert isinstance(layer.mixer, Attention)
        assert layer.mixer.rope is not None
        if layer.mixer.rope.long_inv_freq is not None:
            raise keys.unsupported("rope_type", "two tables of frequencies do not go with three positions")
        layers.append(replace(layer, mixer=replace(layer.mixer, rope=replace(layer.mixer.rope, axes=axes))))
    return replace(decoder, layers=tuple(layers))


def _encoder(c: Config, width: int) -> WindowedEncoder:
    """Return the vision encoder, whose projector has to give ``width`` channels."""
    p = c.part("vision_config") or Config({}, at=f"{c.at}: vision_config")
    # How fast videos are, and what the publisher's code does not read.
    p.ignore("tokens_per_second", "spatial_patch_size")
    for key in ("in_channels", "in_chans"):
        if p.integer(key, 3) != 3:
            raise p.wrong(key, "3, for red, green and blue")
    patch, merge = p.integer("patch_size", 14), p.integer("spatial_merge_size", 2)
    hidden, heads = p.integer("hidden_size", 3584), p.integer("num_heads", 16)
    window = p.integer("window_size", 112) // merge // patch
    if hidden % (4 * heads):
        raise p.wrong(
            "num_heads", f"a number of heads of the {hidden} channels whose size is a multiple of 4"
        )
    if window < 1:
        raise p.wrong("window_size", f"at least {merge * patch} pixels, which become one token")
    if p.integer("out_hidden_size", 3584) != width:
        raise p.wrong("out_hidden_size", f'the "hidden_size" of the text decoder ({width})')
    rope = p.part("rope_parameters") or Config({}, at=p.at)
    if rope.text("rope_type", "axial") != "axial":
        raise rope.wrong("rope_type", '"axial"')
    theta = rope.positive("rope_theta", 10_000.0)
    layers = p.integer("depth", 32)
    whole = p.indices("fullatt_block_indexes") if p.has("fullatt_block_indexes") else [7, 15, 23, 31]
    return WindowedEncoder(
        patch=patch,
        frames=p.integer("temporal_patch_size", 2),
        merge=merge,
        window=window,
        hidden=hidden,
        heads=heads,
        layers=layers,
        whole=tuple(sorted({i for i in whole if i < layers})),
        ffn=GatedMLP(p.integer("intermediate_size", 3420), p.activation("hidden_act", "silu"), bias=True),
        norm=_NORM,
        inv_freq=from_parts(
            Config({}, at=p.at), Config({}, at=p.at), hidden // heads // 2, max_tokens=1, theta=theta
        ).inv_freq,
    )


def _sources(vision: Vision, encoder: WindowedEncoder, hidden: int) -> Sources:
    wide = encoder.hidden
    sources: Sources = {}
    for p in vision_parameters(vision, hidden):
        stored = None
        if p.part == "patches":
            stored = (wide, 3, encoder.frames, encoder.patch, encoder.patch)
        if p.layer is None:
            sources[p.name] = Source(f"{_OTHERS[p.part]}.{p.kind}", stored=stored)
        elif p.part in ("q", "k", "v"):
            start = "qkv".index(p.part) * wide
            name = f"visual.blocks.{p.layer}.attn.qkv.{p.kind}"
            sources[p.name] = Source(name, rows=(start, start + wide))
        else:
            sources[p.name] = Source(f"visual.blocks.{p.layer}.{_LAYER[p.part]}.{p.kind}")
    return sources
