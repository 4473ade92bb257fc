"""StableLM 2, 3B and Zephyr: Llama with LayerNorm and a quarter of each head rotated; 12B norms each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import Sizes, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm, Source, Sources

MODEL_TYPES = ("stablelm",)

# The norms of heads are one matrix there: [heads, channels of a head].
GGUF = Gguf(
    "stablelm",
    "stablelm",
    keys={
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
    },
    config={"partial_rotary_factor": 1.0},
    present={"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm.weight"},
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a StableLM checkpoint; with ``qk_layernorm`` each head has a norm of its own."""
    c = Config(config)
    s = sizes(c, kv_heads=32)
    # The publisher's first code had other names for two of the keys.
    c.expect("norm_eps", c.positive("layer_norm_eps", 1e-5, most=1.0))
    c.expect("rope_pct", c.values.get("partial_rotary_factor", 0.25))
    norm = Norm(c.positive("layer_norm_eps", 1e-5, most=1.0), kind="layer", bias=True)
    parallel = c.flag("use_parallel_residual", False)
    apart = c.flag("qk_layernorm", False)
    mixer = attention(
        s,
        rope=rope(c, s.head_dim, max_tokens=s.max_tokens, partial=0.25),
        qkv_bias=c.flag("use_qkv_bias", False),
        qk_norm=replace(norm, bias=False) if apart else None,
    )
    layer = Layer(
        mixer=replace(mixer, qk_norm_apart=apart),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu")),
        mixer_pre=norm,
        ffn_pre=None if parallel else norm,
        parallel=parallel,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    if not apart:
        return architecture(decoder, "llama")
    return replace(architecture(decoder, "llama", fused=_norms(s)), others=_norms(s, stacked=True))


def _norms(s: Sizes, *, stacked: bool = False) -> Sources:
    """Return where the norms of heads lie: each head's in a tensor of its own, or all as one matrix."""
    result: Sources = {}
    for i in range(s.layers):
        for part, heads in (("q", s.heads), ("k", s.kv_heads)):
            name, module = f"layers.{i}.{part}_norm.weight", f"model.layers.{i}.self_attn"
            first, *others = (f"{module}.{part}_layernorm.norms.{head}.weight" for head in range(heads))
            if stacked:
                result[name] = Source(f"{module}.{part}_norm.weight", stored=(heads, s.head_dim))
            else:
                result[name] = Source(first, below=tuple(others))
    return result
