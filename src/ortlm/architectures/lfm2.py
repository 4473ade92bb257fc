"""LFM2: gated short convolutions, and attention in every few layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import FULL, WithDefaults
from ortlm.architectures._parts import MOST_WIDE, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm, ShortConv

MODEL_TYPES = ("lfm2",)
_CONV = "conv"
# Published files hold these, which no code of the model looks at.
_UNUSED = (
    "block_dim", "block_norm_eps", "block_use_swiglu", "block_use_xavier_init", "block_mlp_init_scale",
    "block_out_init_scale", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc",
    "theta",
)  # fmt: skip
_NAMES = {
    "mixer_pre": "operator_norm",
    "in": "conv.in_proj",
    "conv": "conv.conv",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "ffn_pre": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
    "final_norm": "model.embedding_norm",
}

# The width of the MLP is the final one there, and convolutions have no biases.
GGUF = Gguf(
    "lfm2",
    "lfm2",
    keys={"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
    config={"block_auto_adjust_ff_dim": False},
    tensors={
        "token_embd_norm": "model.embedding_norm",
        "blk.attn_norm": "operator_norm",
        "blk.shortconv.in_proj": "conv.in_proj",
        "blk.shortconv.out_proj": "conv.out_proj",
        "blk.attn_q_norm": "self_attn.q_layernorm",
        "blk.attn_k_norm": "self_attn.k_layernorm",
        "blk.attn_output": "self_attn.out_proj",
        "blk.ffn_norm": "ffn_norm",
        "blk.ffn_gate": "feed_forward.w1",
        "blk.ffn_up": "feed_forward.w3",
        "blk.ffn_down": "feed_forward.w2",
    },
    without_heads=_CONV,
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an LFM2 checkpoint."""
    # Older files have other names for two of the keys, which win.
    old = {
        "intermediate_size": config.get("block_ff_dim"),
        "tie_word_embeddings": config.get("tie_embedding"),
    }
    c = Config(
        WithDefaults(config, {}, fixed={key: value for key, value in old.items() if value is not None})
    )
    # Where a file has both names, the old ones win, as in transformers.
    c.ignore("intermediate_size", "tie_word_embeddings")
    s = sizes(c)
    norm = Norm(c.positive("norm_eps", 1e-5, most=1.0))
    full = attention(s, rope=rope(c, s.head_dim, max_tokens=s.max_tokens, theta=1e6), qk_norm=norm)
    short = ShortConv(
        s.hidden, c.integer("conv_L_cache", 3, least=2, most=64), bias=c.flag("conv_bias", False)
    )
    kinds = c.layer_kinds(s.layers, (FULL, _CONV))
    if kinds is None:
        places = c.indices("full_attn_idxs") if c.has("full_attn_idxs") else list(range(s.layers))
        kinds = [FULL if i in places else _CONV for i in range(s.layers)]
    c.ignore("full_attn_idxs", *_UNUSED)
    if FULL not in kinds:
        raise c.wrong("layer_types", f'a list with at least one "{FULL}"')
    ffn = GatedMLP(_intermediate(c, s.intermediate), "silu")
    layers = tuple(Layer(full if kind == FULL else short, ffn, norm, norm) for kind in kinds)
    outs = {
        f"layers.{i}.o": "self_attn.out_proj" if kind == FULL else "conv.out_proj"
        for i, kind in enumerate(kinds)
    }
    return architecture(decoder_of(c, s, layers, norm, tied=True), "lfm2", names={**_NAMES, **outs})


def _intermediate(c: Config, stated: int) -> int:
    """Return the width of the MLP, which files state before it is made two thirds and rounded up."""
    if not c.flag("block_auto_adjust_ff_dim", True):
        c.ignore("block_ffn_dim_multiplier", "block_multiple_of")
        return stated
    width = int(2 * stated / 3)
    if c.values.get("block_ffn_dim_multiplier", 1.0) is None:
        c.ignore("block_multiple_of")
        return width
    width = int(c.positive("block_ffn_dim_multiplier", 1.0) * width)
    multiple = c.integer("block_multiple_of", 256, most=MOST_WIDE)
    return multiple * -(-width // multiple)
