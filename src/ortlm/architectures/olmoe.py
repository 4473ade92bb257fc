"""OLMoE: eight of 64 experts, weighted by the softmax over all; queries and keys normed over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, check_silu, decoder_of, experts, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import CHOSEN_SOFTMAX, SOFTMAX, Architecture, Layer, Norm

MODEL_TYPES = ("olmoe",)
GGUF = Gguf("olmoe", "olmoe", mixture=True, config={"norm_topk_prob": False})


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an OLMoE checkpoint."""
    c = Config(config)
    s = sizes(c)
    check_silu(c)
    c.refuse("clip_qkv", "queries, keys and values that are clipped are not supported")
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    bias = c.flag("attention_bias", False)
    several = experts(c, 64, chosen=8, intermediate=s.intermediate)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            qk_norm_full=True,
        ),
        ffn=replace(several, routing=CHOSEN_SOFTMAX if c.flag("norm_topk_prob", False) else SOFTMAX),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    # onnxruntime-genai has no type of its own for OLMoE; all it needs to know is a plain key/value cache.
    return architecture(decoder, "olmo")
