"""Gemma 3 text: Gemma 2 with normed heads instead of capped scores, and two rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import SANDWICH_TENSORS, Gguf, head_scalar
from ortlm.architectures._keys import FULL, SLIDING, WithDefaults
from ortlm.architectures._parts import SANDWICH, Sizes, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import from_parts
from ortlm.spec import Architecture, GatedMLP, Layer, Norm, Rope

MODEL_TYPES = ("gemma3_text",)


def _finish_gguf(values: Mapping[str, Any]) -> dict[str, Any]:
    # The one of 27 billion parameters, by its layers.
    found = head_scalar(values, by_width=values.get("num_hidden_layers") == 62)
    found["final_logit_softcapping"] = values.get("final_logit_softcapping") or None
    if not values.get("sliding_window"):
        found |= {"sliding_window": 4096, "layer_types": [FULL] * int(values["num_hidden_layers"])}
    return found


GGUF = Gguf(
    "gemma3",
    "gemma3_text",
    keys={
        "attention.sliding_window": "sliding_window",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
    tensors=SANDWICH_TENSORS,
    norm_add=1.0,
    finish=_finish_gguf,
)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Gemma 3 text checkpoint: 270m, 1b, or a text part saved on its own."""
    c = Config(config)
    c.refuse("use_bidirectional_attention", "only causal attention can be built")
    s = sizes(c, head_dim=256)
    if not c.has("sliding_window", 4096):
        raise c.wrong("sliding_window", "a number of tokens, for the layers that have a window")
    norm = Norm(c.positive("rms_norm_eps", 1e-6, most=1.0))
    bias = c.flag("attention_bias", False)
    turns = ropes(c, s)
    windows = {FULL: None, SLIDING: c.window(s.max_tokens, default=4096)}
    mixers = {
        kind: attention(
            s,
            rope=turns[kind],
            scale=c.positive("query_pre_attn_scalar", 256.0) ** -0.5,
            window=windows[kind],
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
        )
        for kind in (FULL, SLIDING)
    }
    c.ignore("hidden_act")
    ffn = GatedMLP(s.intermediate, c.activation("hidden_activation", "gelu_pytorch_tanh"))
    every, notes = c.integer("sliding_window_pattern", 6), []
    kinds = c.layer_types(s.layers, windowed=True)
    if kinds is None:
        kinds = [SLIDING if (i + 1) % every else FULL for i in range(s.layers)]
        if c.integer("_sliding_window_pattern", every) != every:
            notes.append(
                f'{c.at}: "_sliding_window_pattern" without "layer_types" is ignored, as in transformers: '
                f"full attention is in every {every}th layer."
            )
    c.ignore("_sliding_window_pattern")
    decoder = decoder_of(
        c,
        s,
        tuple(Layer(mixers[kind], ffn, norm, norm, mixer_post=norm, ffn_post=norm) for kind in kinds),
        norm,
        tied=True,
        embed_scale=s.hidden**0.5,
        logit_softcap=c.positive_or_none("final_logit_softcapping") or 0.0,
    )
    return architecture(decoder, "gemma3_text", names=SANDWICH, norm_add=1.0, notes=notes)


def ropes(c: Config, s: Sizes) -> dict[str, Rope]:
    """Return the rotation of each kind of layer; the old ``rope_scaling`` is for full attention alone."""
    both = c.part("rope_parameters") or Config({}, at=c.at)
    nothing = Config({}, at=c.at)
    full, old = both.part(FULL) or nothing, c.part("rope_scaling")
    if old is not None:
        if "rope_type" not in old.values and "rope_type" not in full.values:
            # transformers passes over the other spelling here, and with it over the scaling.
            raise old.wrong("rope_type", 'the kind of scaling (the older key "type" does not count here)')
        full = Config(WithDefaults(old.values, full.values), at=old.at)
    sliding = both.part(SLIDING) or nothing
    theta = c.positive("rope_theta", 1e6)
    local = c.positive("rope_local_base_freq", 1e4)
    return {
        FULL: from_parts(full, c, s.head_dim, max_tokens=s.max_tokens, theta=theta),
        SLIDING: from_parts(sliding, c, s.head_dim, max_tokens=s.max_tokens, theta=local),
    }
