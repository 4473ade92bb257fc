"""Llama with other defaults, biases or rotation: what several families are."""

from __future__ import annotations

from ortlm.architectures._config import Config
from ortlm.architectures._parts import Sizes, attention, decoder_of
from ortlm.spec import Decoder, GatedMLP, Layer, Norm, Rope


def llama_like(
    c: Config,
    s: Sizes,
    rope: Rope,
    *,
    eps: float,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
) -> Decoder:
    """Return a decoder of norms before both branches, attention and a gated MLP with SiLU.

    ``eps`` and ``tied`` are what the family assumes where keys are absent.
    """
    norm = Norm(c.positive("rms_norm_eps", eps, most=1.0))
    mixer = attention(s, rope=rope, qkv_bias=qkv_bias, out_bias=out_bias)
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"), bias=mlp_bias)
    return decoder_of(c, s, (Layer(mixer, ffn, norm, norm),) * s.layers, norm, tied=tied)
