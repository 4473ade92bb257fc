"""Mixtral: Mistral with experts; each token takes two of eight, weighted by the softmax over those two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, check_silu, decoder_of, experts, sizes
from ortlm.architectures._rope import KINDS, rope
from ortlm.spec import Architecture, Layer, Norm

MODEL_TYPES = ("mixtral",)
# Where a file has no base of the rotation, it is Llama's.
GGUF = Gguf("llama", "mixtral", mixture=True, interleaved=True, config={"rope_theta": 10000.0})

# transformers cannot compute "dynamic" for this family, so that nothing says what it would be.
_ROPES = tuple(kind for kind in KINDS if kind != "dynamic")
NAMES = {
    "router": "block_sparse_moe.gate",
    "expert_gate": "block_sparse_moe.experts.{}.w1",
    "expert_up": "block_sparse_moe.experts.{}.w3",
    "expert_down": "block_sparse_moe.experts.{}.w2",
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Mixtral checkpoint."""
    c = Config(config)
    s = sizes(c)
    check_silu(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens, theta=1e6, kinds=_ROPES),
            window=c.window(s.max_tokens),
        ),
        ffn=experts(c, 8, chosen=2, intermediate=s.intermediate),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    # onnxruntime-genai has no type of its own for Mixtral, whose cache is Mistral's.
    return architecture(decoder, "mistral", names=NAMES)
