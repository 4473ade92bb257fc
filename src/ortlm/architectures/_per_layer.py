"""What small Gemmas do to be small: layers that share keys and values, and per-layer embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ortlm.architectures._config import Config
from ortlm.architectures._parts import MOST_TOKENS, MOST_WIDE, Sizes
from ortlm.spec import Architecture, Decoder, Norm, PerLayerInputs, Source, Sources

# Module names of ``PerLayerInputs``, by canonical part.
PER_LAYER_NAMES = {
    "per_layer_embed": "model.embed_tokens_per_layer",
    "per_layer_map": "",
    "per_layer_map_norm": "model.per_layer_projection_norm",
    "per_layer_gate": "per_layer_input_gate",
    "per_layer_out": "per_layer_projection",
    "per_layer_post": "post_per_layer_input_norm",
}


def kv_sources(c: Config, kinds: Sequence[str], *, absent: int) -> list[int | None]:
    """Return for each layer whose keys and values it shares: of the last ``num_kv_shared_layers`` (or ``absent``).

    It is the last layer of the same kind before them.
    """
    own = len(kinds) - c.integer("num_kv_shared_layers", absent, least=0)
    if own < len(kinds) and not set(kinds[own:]) <= set(kinds[: max(own, 0)]):
        raise c.wrong(
            "num_kv_shared_layers",
            'a number of last layers of which every kind ("layer_types") is before them',
        )
    last = {kind: i for i, kind in enumerate(kinds[:own])}
    return [None if i < own else last[kind] for i, kind in enumerate(kinds)]


def per_layer_inputs(c: Config, s: Sizes, norm: Norm, act: str) -> PerLayerInputs | None:
    """Return the per-layer inputs, None if they have a width of 0."""
    width = c.integer("hidden_size_per_layer_input", 256, least=0, most=MOST_WIDE)
    vocab = c.integer("vocab_size_per_layer_input", 262_144, most=MOST_TOKENS)
    if not width:
        return None
    return PerLayerInputs(vocab, width, scale=width**0.5, map_scale=s.hidden**-0.5, norm=norm, act=act)


def per_layer_sources(decoder: Decoder) -> Sources:
    """Return where the map of each layer lies: all of them are one matrix."""
    inputs = decoder.per_layer_inputs
    if inputs is None:
        return {}
    return {
        f"layers.{i}.per_layer_map.weight": Source(
            "model.per_layer_model_projection.weight", rows=(i * inputs.width, (i + 1) * inputs.width)
        )
        for i in range(len(decoder.layers))
    }


def unused(found: Architecture) -> Architecture:
    """Return ``found``, whose checkpoint may hold maps for keys and values of layers that have none."""
    shared = set(range(len(found.decoder.layers))) - {i for i, _ in found.decoder.cached}
    names = [
        f"model.layers.{i}.self_attn.{part}.*"
        for i in sorted(shared)
        for part in ("k_proj", "v_proj", "k_norm")
    ]
    return replace(found, ignored=(*found.ignored, *names))
