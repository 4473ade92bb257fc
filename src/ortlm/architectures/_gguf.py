"""How GGUF files hold models: what is common, and how a family says what differs.

llama.cpp names tensors and keys of metadata alike in nearly all families. A family file that GGUF files exist of
has ``GGUF``, a ``Gguf`` with its name there and what differs.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's conversion scripts and models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Gguf:
    """How GGUF files hold the models of one family.

    ``name`` is its ``general.architecture``, ``model_type`` what config.json would say. ``keys`` are keys of
    metadata, without the name before them, and config.json's for them, in addition to ``KEYS``; ``required``
    are the only values of others that the model's code has. ``config`` are values that llama.cpp computes
    with and no file states. ``present`` are config.json's keys that are true if a layer has a tensor.
    ``tensors`` overrides ``TENSORS``. ``interleaved``: the two halves of each head of q and k lie
    interleaved, as llama.cpp rotates them. ``norm_add`` is what the conversion adds to the weights of norms.
    ``finish`` gets config.json's values made so far and returns those that follow from several. ``mixture``:
    the family of that name whose files have experts. ``without_heads`` is what config.json calls a layer for
    which the files state zero key/value heads. ``refused`` is why its files are not read, although they
    exist. ``strips_right``: texts of special tokens take the blanks after them, but for those in
    ``keeps_right``; GGUF has no place for that.
    """

    name: str
    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_add: float = 0.0
    finish: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default=dict)
    mixture: bool = False
    without_heads: str = ""
    refused: str = ""
    strips_right: bool = False
    keeps_right: tuple[str, ...] = ()


# Keys of metadata, and what config.json calls them.
KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}

# The same of mixtures of experts, which have to have them.
EXPERT_KEYS: Mapping[str, str] = {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}

# Parts of tensors' names, and the modules of a Hugging Face checkpoint; those of layers begin with "blk.".
TENSORS: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.attn_norm": "input_layernorm",
    "blk.attn_q": "self_attn.q_proj",
    "blk.attn_k": "self_attn.k_proj",
    "blk.attn_v": "self_attn.v_proj",
    "blk.attn_q_norm": "self_attn.q_norm",
    "blk.attn_k_norm": "self_attn.k_norm",
    "blk.attn_output": "self_attn.o_proj",
    "blk.ffn_norm": "post_attention_layernorm",
    "blk.ffn_gate": "mlp.gate_proj",
    "blk.ffn_up": "mlp.up_proj",
    "blk.ffn_down": "mlp.down_proj",
}

# The same for what checkpoints have many forms of: parts of a layer as the spec calls them. All experts of a layer
# are one tensor [experts, out, in].
PARTS: Mapping[str, str] = {
    "blk.attn_sinks": "sinks",
    "blk.shortconv.conv": "conv",
    "blk.ffn_gate_inp": "router",
    "blk.ffn_gate_exps": "expert_gate",
    "blk.ffn_up_exps": "expert_up",
    "blk.ffn_down_exps": "expert_down",
    "blk.ffn_gate_inp_shexp": "shared_scale",
    "blk.ffn_gate_shexp": "shared_gate",
    "blk.ffn_up_shexp": "shared_up",
    "blk.ffn_down_shexp": "shared_down",
}

# The same for norms before and after both branches.
SANDWICH_TENSORS: Mapping[str, str] = {
    "blk.post_attention_norm": "post_attention_layernorm",
    "blk.ffn_norm": "pre_feedforward_layernorm",
    "blk.post_ffw_norm": "post_feedforward_layernorm",
}


def head_scalar(values: Mapping[str, Any], *, by_width: bool) -> dict[str, Any]:
    """Return what scores are divided by the root of: a head's channels, or the hidden size per head."""
    heads = values.get("num_attention_heads")
    wide, deep = values.get("hidden_size"), values.get("head_dim")
    if by_width and isinstance(heads, int) and isinstance(wide, int) and heads > 0:
        return {"query_pre_attn_scalar": wide // heads}
    return {"query_pre_attn_scalar": deep} if deep is not None else {}
