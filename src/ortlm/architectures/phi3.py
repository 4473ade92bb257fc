"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: Llama with fused projections and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import architecture, attention, decoder_of, fused_rows, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm

MODEL_TYPES = ("phi3",)
GGUF = Gguf(
    "phi3",
    "phi3",
    keys={
        "attention.sliding_window": "sliding_window",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    },
    tensors={"blk.attn_qkv": "self_attn.qkv_proj", "blk.ffn_up": "mlp.gate_up_proj"},
    finish=lambda values: {"sliding_window": values.get("sliding_window") or None},
    strips_right=True,
    keeps_right=("<unk>", "<s>", "<|endoftext|>"),
)

# What the original length is where config.json does not say it.
_ORIGINAL = 4096


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Phi-3 or Phi-4 text checkpoint."""
    c = Config(config)
    s = sizes(c)
    notes = _original(c)
    norm = Norm(c.positive("rms_norm_eps", 1e-5, most=1.0))
    layer = Layer(
        mixer=attention(
            s,
            rope=rope(
                c,
                s.head_dim,
                max_tokens=s.max_tokens,
                partial=1.0,
                original=_ORIGINAL,
                # Early revisions named LongRoPE "yarn"; no Phi-3 was trained with YaRN.
                aliases={"yarn": "longrope"},
                kinds=("default", "longrope"),
            ),
            window=c.window(s.max_tokens),
        ),
        ffn=GatedMLP(s.intermediate, c.activation("hidden_act", "silu")),
        mixer_pre=norm,
        ffn_pre=norm,
    )
    decoder = decoder_of(c, s, (layer,) * s.layers, norm)
    fused = fused_rows(s, qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")
    return architecture(decoder, "phi3", fused=fused, notes=notes)


def _original(c: Config) -> list[str]:
    """Return what to say of an original length inside the rope keys, which transformers passes over."""
    if c.has("original_max_position_embeddings"):
        return []
    for name in ("rope_scaling", "rope_parameters"):
        part = c.part(name)
        inner = part.integer("original_max_position_embeddings", _ORIGINAL) if part else _ORIGINAL
        if part and inner != _ORIGINAL:
            found = f'{part.at}: "original_max_position_embeddings" ({inner})'
            where = f'the switch is at {_ORIGINAL}, unless the key is next to "{name}"'
            return [f"{found} is ignored, as in transformers: {where}."]
    return []
