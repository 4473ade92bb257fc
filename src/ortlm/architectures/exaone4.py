"""EXAONE 4: norms after both branches, normed heads; where layers have windows, the others do not rotate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import FULL, SLIDING
from ortlm.architectures._parts import architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("exaone4",)

GGUF = Gguf(
    "exaone4",
    "exaone4",
    keys={"attention.sliding_window": "sliding_window"},
    config={"sliding_window": None},
    tensors={
        "blk.post_attention_norm": "post_attention_layernorm",
        "blk.post_ffw_norm": "post_feedforward_layernorm",
    },
)

_NAMES = {"mixer_post": "post_attention_layernorm", "ffn_post": "post_feedforward_layernorm"}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an EXAONE 4 checkpoint; its pattern counts where ``layer_types`` is absent."""
    c = Config(config)
    s = sizes(c, kv_heads=32)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    windowed = c.has("sliding_window", 4096)
    full = attention(s, rope=rope(c, s.head_dim, max_tokens=s.max_tokens), qk_norm=norm)
    mixers = {
        FULL: replace(full, rope=None) if windowed else full,
        SLIDING: replace(full, window=c.window(s.max_tokens, default=4096)),
    }
    kinds = c.layer_types(s.layers, windowed=windowed) or _by_pattern(c, s.layers, windowed=windowed)
    c.ignore("sliding_window_pattern")
    ffn = GatedMLP(s.intermediate, c.activation("hidden_act", "silu"))
    layers = tuple(Layer(mixers[kind], ffn, None, None, mixer_post=norm, ffn_post=norm) for kind in kinds)
    return architecture(decoder_of(c, s, layers, norm), "llama", names=_NAMES)


def _by_pattern(c: Config, layers: int, *, windowed: bool) -> list[str]:
    """Return what each layer is.

    A number says which ones are full: those it divides, counted from 1. A text such as "LLLG", which transformers
    4 reads and 5 does not, has a letter for each layer, over and over; the last layer is full whatever it says.
    """
    key = "sliding_window_pattern"
    pattern = c.values.get(key, 4)
    if not windowed:
        return [FULL] * layers
    if not isinstance(pattern, str):
        if pattern is None:
            raise c.wrong(key, 'a number of layers, or a text such as "LLLG"')
        every = c.integer(key, 4)
        return [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    if not pattern or set(pattern) - {"L", "G"}:
        raise c.wrong(key, 'a number of layers, or a text of "L" and "G", for local and global')
    kinds = [SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(layers)]
    return [*kinds[:-1], FULL]
