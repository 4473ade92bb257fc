"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: Llama with fused projections and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.architectures._config import Config
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._parts import Sizes, architecture, attention, decoder_of, sizes
from ortlm.architectures._rope import rope
from ortlm.spec import Architecture, GatedMLP, Layer, Norm, Source, Sources

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
    return architecture(decoder, "phi3", fused=_fused(s), notes=notes)


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


def _fused(s: Sizes) -> Sources:
    """Return where the parts of ``qkv_proj`` (q, k, v) and ``gate_up_proj`` (gate, up) lie, as rows."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    result: Sources = {}
    for i in range(s.layers):
        qkv = f"model.layers.{i}.self_attn.qkv_proj.weight"
        gate_up = f"model.layers.{i}.mlp.gate_up_proj.weight"
        result[f"layers.{i}.q.weight"] = Source(qkv, rows=(0, q))
        result[f"layers.{i}.k.weight"] = Source(qkv, rows=(q, q + kv))
        result[f"layers.{i}.v.weight"] = Source(qkv, rows=(q + kv, q + 2 * kv))
        result[f"layers.{i}.gate.weight"] = Source(gate_up, rows=(0, s.intermediate))
        result[f"layers.{i}.up.weight"] = Source(gate_up, rows=(s.intermediate, 2 * s.intermediate))
    return result
