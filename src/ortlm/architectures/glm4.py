"""GLM-4: fused gate and up, half of each head rotated in pairs of neighbors; from 0414 on norms after branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, fused_rows, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("glm", "glm4")

# Files of "glm" have another name, and maps of an older form.
GGUF = Gguf(
    "glm4",
    "glm4",
    config={"partial_rotary_factor": 1.0},
    present={"attention_bias": "attn_q.bias"},
    tensors={
        "blk.post_attention_norm": "post_self_attn_layernorm",
        "blk.post_ffw_norm": "post_mlp_layernorm",
        "blk.ffn_up": "mlp.gate_up_proj",
    },
)

_NAMES = {"mixer_post": "post_self_attn_layernorm", "ffn_post": "post_mlp_layernorm"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a GLM-4 checkpoint: ``glm`` is GLM-4-9B, ``glm4`` what came in April 2025."""
    c = Config(config)
    s = sizes(c, head_dim=128, kv_heads=2)
    norm = Norm(c.positive("rms_norm_eps", 1.5625e-07, most=1.0))
    after = norm if c.text("model_type") == "glm4" else None
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens, partial=0.5, interleaved=True),
            qkv_bias=c.flag("attention_bias", True),
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu")),
        mixer_pre=norm,
        ffn_pre=norm,
        mixer_post=after,
        ffn_post=after,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    return architecture(decoder, "llama", names=_NAMES, fused=fused_rows(s, gate_up="mlp.gate_up_proj"))
