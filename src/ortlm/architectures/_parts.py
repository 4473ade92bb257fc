"""What nearly all families share: sizes, and tensor names that follow one pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ortlm.architectures._config import Config
from ortlm.spec import Architecture, Decoder, Source, Sources, parameters

# Canonical part of a layer, or of the model, to the usual module name.
_NAMES = {
    "embed": "model.embed_tokens",
    "mixer_pre": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "ffn_pre": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}

# A norm before and after both branches, as Gemma 2 and 3 have it.
SANDWICH = {
    "mixer_post": "post_attention_layernorm",
    "ffn_pre": "pre_feedforward_layernorm",
    "ffn_post": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a decoder, checked against each other; ``max_tokens`` is the context length in tokens."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_tokens: int


def sizes(config: Config, *, head_dim: int | None = None) -> Sizes:
    """Read the sizes; by default a head has ``head_dim`` channels, or hidden size over heads if None."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f'a divisor of "num_attention_heads" ({heads})')
    if head_dim is None and config.values.get("head_dim") is None and hidden % heads:
        raise config.wrong(
            "hidden_size", f'a multiple of "num_attention_heads" ({heads}) where "head_dim" is absent'
        )
    return Sizes(
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.integer("head_dim", head_dim or hidden // heads),
        max_tokens=config.integer("max_position_embeddings"),
    )


def architecture(
    decoder: Decoder,
    genai_type: str,
    *,
    names: Mapping[str, str] | None = None,
    norm_add: float = 0.0,
    fused: Sources | None = None,
) -> Architecture:
    """Return ``decoder`` with a source for each weight.

    ``names`` overrides module names by canonical part, ``fused`` whole sources by canonical weight name, and
    ``norm_add`` is added to each norm's weight.
    """
    known = _NAMES | dict(names or {})
    sources: Sources = {}
    for parameter in parameters(decoder):
        *at, part, leaf = parameter.name.split(".")
        layer = f"model.layers.{at[1]}." if at else ""
        add = norm_add if parameter.role == "norm" and leaf == "weight" else 0.0
        sources[parameter.name] = Source(f"{layer}{known[part]}.{leaf}", add=add)
    sources |= fused or {}
    return Architecture(decoder, sources, genai_type)
