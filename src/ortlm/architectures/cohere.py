"""Command R (Cohere) and Command R7B, A (Cohere 2): attention and MLP side by side, LayerNorm without biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import FULL, SLIDING
from ortlm.architectures._parts import Sizes, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, Attention, GatedMLP, Layer, Norm, Source, parameters

MODEL_TYPES = ("cohere", "cohere2")

# Layers without a window do not rotate; that no bias exists is llama.cpp's, too.
GGUF = (
    Gguf(
        "command-r",
        "cohere",
        keys={"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
        present={"use_qk_norm": "attn_q_norm.weight"},
    ),
    Gguf(
        "cohere2",
        "cohere2",
        keys={
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "logit_scale": "logit_scale",
            "attention.sliding_window": "sliding_window",
        },
        config={"sliding_window_pattern": 4},
    ),
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Cohere checkpoint; Cohere 2 rotates in layers with a window only."""
    c = Config(config)
    second = c.text("model_type") == "cohere2"
    s = sizes(c)
    norm = Norm(c.positive("layer_norm_eps", 1e-5, most=1.0), kind="layer")
    bias = c.flag("attention_bias", False)
    apart = not second and c.flag("use_qk_norm", False)
    theta = 10_000.0 if second else 500_000.0
    full = replace(
        attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens, theta=theta, interleaved=True),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm if apart else None,
        ),
        qk_norm_apart=apart,
    )
    mixers = _alternating(c, s, full) if second else [full] * s.layers
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"))
    decoder = decoder_of(
        c,
        s,
        tuple(Layer(mixer, ffn, norm, None, parallel=True) for mixer in mixers),
        norm,
        tied=True,
        logit_scale=c.positive("logit_scale", 0.0625),
    )
    found = architecture(decoder, "llama")
    # The norm of all heads is one matrix there: [heads, channels of a head].
    matrices = {
        p.name: Source(found.sources[p.name].tensor, stored=(p.shape[0] // s.head_dim, s.head_dim))
        for p in parameters(decoder)
        if p.part in ("q_norm", "k_norm")
    }
    return replace(found, sources={**found.sources, **matrices})


def _alternating(c: Config, s: Sizes, full: Attention) -> list[Attention]:
    """Return Cohere 2's layers: ``sliding_window_pattern`` counts where ``layer_types`` is absent."""
    if not c.has("sliding_window", 4096):
        raise c.wrong("sliding_window", "a number of tokens, for the layers that have a window")
    every = c.integer("sliding_window_pattern", 4)
    # Published files say in further words what the family does.
    c.expect("layer_switch", every)
    c.expect("order_of_interleaved_layers", "local_attn_first")
    c.expect("position_embedding_type", "rope_gptj")
    c.expect("use_gated_activation", True)
    c.expect("use_parallel_block", True)
    c.ignore("use_parallel_embedding", "use_embedding_sharing")
    kinds = c.layer_types(s.layers, windowed=True) or [
        SLIDING if (i + 1) % every else FULL for i in range(s.layers)
    ]
    mixers = {
        FULL: replace(full, rope=None),
        SLIDING: replace(full, window=c.window(s.max_tokens, default=4096)),
    }
    return [mixers[kind] for kind in kinds]
