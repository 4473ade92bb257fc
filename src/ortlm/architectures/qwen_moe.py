"""Qwen2-MoE and Qwen3-MoE: layers of experts among dense ones; Qwen2-MoE has one expert for all tokens, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import FULL, SLIDING
from ortlm.architectures._parts import (
    MOST_WIDE,
    architecture,
    attention,
    check_silu,
    decoder_of,
    experts,
    sizes,
)
from ortlm.architectures._rope import rope
from ortlm.spec import (
    CHOSEN_SOFTMAX,
    SOFTMAX,
    Architecture,
    Experts,
    GatedMLP,
    Layer,
    Norm,
)

MODEL_TYPES = ("qwen2_moe", "qwen3_moe")


def _expert_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of experts as llama.cpp takes them where an old file does not state them."""
    wide = values.get("intermediate_size")
    if not isinstance(wide, int):
        return {}
    found = {"moe_intermediate_size": wide // values["num_experts_per_tok"]}
    if values["model_type"] == "qwen2_moe":
        found["shared_expert_intermediate_size"] = wide
    return {name: values.get(name, value) for name, value in found.items()}


# Whether the weights of chosen experts sum to one is stated nowhere: llama.cpp has one answer for each family.
GGUF = (
    Gguf(
        "qwen2moe",
        "qwen2_moe",
        mixture=True,
        keys={
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        config={"norm_topk_prob": False},
        present={"qkv_bias": "attn_q.bias"},
        finish=_expert_sizes,
    ),
    Gguf(
        "qwen3moe",
        "qwen3_moe",
        mixture=True,
        keys={"expert_feed_forward_length": "moe_intermediate_size"},
        config={"norm_topk_prob": True},
        present={"attention_bias": "attn_q.bias"},
        finish=_expert_sizes,
    ),
)

SHARED_NAMES = {
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_scale": "mlp.shared_expert_gate",
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Qwen2-MoE or Qwen3-MoE checkpoint."""
    c = Config(config)
    qwen3 = c.text("model_type") == "qwen3_moe"
    s = sizes(c)
    check_silu(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False) if qwen3 else c.flag("qkv_bias", True)
    full = attention(
        s,
        rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
        qkv_bias=bias,
        out_bias=qwen3 and bias,
        qk_norm=norm if qwen3 else None,
    )
    windowed = c.flag("use_sliding_window", False) and c.has("sliding_window", 4096)
    window = c.window(s.max_tokens, default=4096) if windowed else None
    if not windowed:
        c.ignore("sliding_window")
    mixers = {FULL: full, SLIDING: replace(full, window=window)}
    if qwen3:
        kinds = [SLIDING] * s.layers
    else:
        first = c.integer("max_window_layers", 28, least=0)
        kinds = c.layer_types(s.layers, windowed=windowed) or [
            SLIDING if windowed and i % 2 == 0 and i < first else FULL for i in range(s.layers)
        ]
    several = replace(
        experts(
            c, 128 if qwen3 else 60, chosen=8 if qwen3 else 4,
            intermediate=c.integer("moe_intermediate_size", 768 if qwen3 else 1408, most=MOST_WIDE),
        ),
        routing=CHOSEN_SOFTMAX if c.flag("norm_topk_prob", False) else SOFTMAX,
        shared=0 if qwen3 else c.integer("shared_expert_intermediate_size", 5632, most=MOST_WIDE),
        shared_scale=not qwen3,
    )  # fmt: skip
    dense = GatedMLP(s.intermediate, "silu")
    only_dense, every = c.indices("mlp_only_layers"), c.integer("decoder_sparse_step", 1)
    layers = tuple(
        Layer(mixers[kind], dense if i in only_dense or (i + 1) % every else several, norm, norm)
        for i, kind in enumerate(kinds)
    )
    # onnxruntime-genai has no types of their own for these; their caches are those of the dense models.
    return architecture(decoder_of(c, s, layers, norm), "qwen3" if qwen3 else "qwen2", names=SHARED_NAMES)


def of_all_layers(c: Config, *, count: int, chosen: int) -> Experts:
    """Return the experts of later generations, with one for all tokens; ``count`` and ``chosen`` are defaults."""
    wide = c.integer("moe_intermediate_size", 512, most=MOST_WIDE)
    return replace(
        experts(c, count, chosen=chosen, intermediate=wide),
        shared=c.integer("shared_expert_intermediate_size", 512, most=MOST_WIDE),
        shared_scale=True,
    )
