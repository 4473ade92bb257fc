"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side, LayerNorm, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import MLP, Architecture, Layer, Norm

MODEL_TYPES = ("phi",)
GGUF = Gguf(
    "phi2",
    "phi",
    keys={"attention.layer_norm_epsilon": "layer_norm_eps"},
    tensors={
        "output_norm": "model.final_layernorm",
        "blk.attn_output": "self_attn.dense",
        "blk.ffn_up": "mlp.fc1",
        "blk.ffn_down": "mlp.fc2",
    },
)

_NAMES = {
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "o": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "final_norm": "model.final_layernorm",
}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Phi-1, 1.5 or 2 checkpoint."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("layer_norm_eps", 1e-5, most=1.0), kind="layer", bias=True)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens, partial=0.5),
            qkv_bias=True,
            out_bias=True,
            qk_norm=norm if c.flag("qk_layernorm", False) else None,
        ),
        ffn=MLP(s.intermediate, c.activation("hidden_act", "gelu_new"), bias=True),
        mixer_pre=norm,
        ffn_pre=None,
        parallel=True,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm, head_bias=True)
    return architecture(decoder, "phi", names=_NAMES)
