"""StarCoder2: LayerNorm, a plain MLP with GELU, and biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import MLP, Architecture, Layer, Norm

MODEL_TYPES = ("starcoder2",)

# Files state no window, and llama.cpp has none.
GGUF = Gguf(
    "starcoder2",
    "starcoder2",
    keys={"attention.layer_norm_epsilon": "norm_epsilon"},
    config={"sliding_window": None},
    present={"use_bias": "attn_q.bias"},
    tensors={"blk.ffn_up": "mlp.c_fc", "blk.ffn_down": "mlp.c_proj"},
)

_NAMES = {"up": "mlp.c_fc", "down": "mlp.c_proj"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a StarCoder2 checkpoint; ``use_bias`` is of all matrices but the head."""
    c = Config(config)
    s = sizes(c, kv_heads=2)
    norm = Norm(c.positive("norm_epsilon", 1e-5, most=1.0), kind="layer", bias=True)
    bias = c.flag("use_bias", True)
    c.expect("norm_type", "layer_norm")
    c.expect("mlp_type", "default")
    c.expect("scale_attn_weights", True)
    # Published files hold these of an older class, which no code of the model looks at.
    c.ignore("activation_function", "layer_norm_epsilon", "attention_softmax_in_fp32")
    c.ignore("scale_attention_softmax_in_fp32")
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            window=c.window(s.max_tokens),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=MLP(s.intermediate, c.activation("hidden_act", "gelu_pytorch_tanh"), bias=bias),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    return architecture(decoder_of(c, s, (layer,) * s.layers, norm, tied=True), "llama", names=_NAMES)
