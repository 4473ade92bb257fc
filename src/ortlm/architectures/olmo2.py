"""OLMo 2: Llama with norms after both branches instead of before; queries and keys normed over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import SANDWICH_TENSORS, Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("olmo2",)


def _with_windows(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a model with windows an OLMo 3, which has the name of OLMo 2 in GGUF files.

    Layers with a window rotate by the same base, and without scaling.
    """
    if not values.get("sliding_window"):
        return {}
    base = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    full = {**(values.get("rope_scaling") or {}), **base}
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", **base}}
    return {"model_type": "olmo3", "rope_scaling": None, "rope_parameters": ropes}


GGUF = Gguf(
    "olmo2",
    "olmo2",
    keys={"attention.sliding_window": "sliding_window"},
    tensors=SANDWICH_TENSORS,
    finish=_with_windows,
)

_NAMES = {"mixer_post": "post_attention_layernorm", "ffn_post": "post_feedforward_layernorm"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an OLMo 2 checkpoint."""
    c = Config(config)
    s = sizes(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    bias = c.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(c, s.head_dim, max_tokens=s.max_tokens),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            qk_norm_full=True,
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu")),
        mixer_pre=None,
        ffn_pre=None,
        mixer_post=norm,
        ffn_post=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    # onnxruntime-genai has no type of its own for OLMo 2; all it needs to know is a plain key/value cache.
    return architecture(decoder, "olmo", names=_NAMES)
