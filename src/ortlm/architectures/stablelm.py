"""StableLM 2, 3B and Zephyr: Llama with LayerNorm and a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("stablelm",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a StableLM checkpoint; ``qk_layernorm``, of the 12B model, is refused."""
    c = Config(config)
    c.refuse("qk_layernorm", "a norm for each head, in tensors of its own, cannot be built")
    s = sizes(c, kv_heads=32)
    # The publisher's first code had other names for two of the keys.
    c.expect("norm_eps", c.positive("layer_norm_eps", 1e-5, most=1.0))
    c.expect("rope_pct", c.values.get("partial_rotary_factor", 0.25))
    norm = Norm(c.positive("layer_norm_eps", 1e-5, most=1.0), kind="layer", bias=True)
    parallel = c.flag("use_parallel_residual", False)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens, partial=0.25),
            qkv_bias=c.flag("use_qkv_bias", False),
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu")),
        mixer_pre=norm,
        ffn_pre=None if parallel else norm,
        parallel=parallel,
    )
    return architecture(decoder_of(c, s, (layer,) * s.layers, norm), "llama")
