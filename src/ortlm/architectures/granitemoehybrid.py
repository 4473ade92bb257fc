"""Granite 4, H included: Granite with a fused MLP, with or without experts, and Mamba-2 in most layers of H."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import granitemoe
from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, shown
from ortlm.architectures._parts import MOST_WIDE, Sizes, architecture, check_silu, experts, sizes
from ortlm.architectures.granite import multiplied
from ortlm.errors import UnsupportedModel
from ortlm.spec import Architecture, Experts, GatedMLP, Mamba2, Mixer, Norm, Source, Sources

MODEL_TYPES = ("granitemoehybrid",)
# Both generations of names.
_ATTENTION, _MAMBA = ("attention", FULL), ("mamba", "linear_attention")
# As JSON has it, and as transformers writes it.
_UNLIMITED = (float("inf"), {"__float__": "Infinity"})


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Granite 4 checkpoint; without "rope" there are no positions at all."""
    c = Config(config)
    s = sizes(c)
    kinds = c.values.get("layer_types") or c.values.get("layers_block_type") or ["linear_attention"]
    known = {*_ATTENTION, *_MAMBA}
    other = {str(kind) for kind in kinds} - known if isinstance(kinds, list) else {"unknown"}
    if other or len(kinds) != s.layers or not {*kinds} & {*_ATTENTION}:
        raise UnsupportedModel(
            f'{c.at}: "layer_types" is {shown(kinds)}; {s.layers} layers of attention, or of that and Mamba-2, '
            "can be built."
        )
    state_space = _mamba(c, s) if {*kinds} & {*_MAMBA} else None
    if state_space is None:
        c.ignore(*(key for key in c.values if key.startswith("mamba_")), "time_step_limit")
    wide = c.integer("shared_intermediate_size", 1024)
    ffn: GatedMLP | Experts = GatedMLP(wide, c.activation("hidden_act", "silu"))
    fused = _shared(s.layers, wide, "")
    if c.integer("num_local_experts", 8, least=0):
        check_silu(c)
        ffn = replace(experts(c, 8, chosen=2, intermediate=s.intermediate), shared=wide)
        fused = _shared(s.layers, wide, "shared_") | granitemoe.fused(s, ffn.experts)
    c.ignore("num_experts_per_tok", "intermediate_size")
    c.expect("normalization_function", "rmsnorm")
    c.ignore("init_method")
    rotates = c.text("position_embedding_type", "none") == "rope"
    names = {
        "down": "shared_mlp.output_linear", "shared_down": "shared_mlp.output_linear",
        "shared_gate": "", "shared_up": "", "router": "block_sparse_moe.router.layer",
        "z": "", "in": "", "a": "", "a_log": "", "dt_bias": "", "skip": "",
        "conv": "mamba.conv1d", "out_norm": "mamba.norm",
    }  # fmt: skip
    decoder = multiplied(c, s, ffn)
    full = next(decoder.attentions)
    if not rotates:
        full = replace(full, rope=None)
    layers = list(decoder.layers)
    for i, kind in enumerate(kinds):
        mixer: Mixer = full
        if kind in _MAMBA and state_space is not None:
            mixer = state_space
            fused |= _rows(state_space, i)
            names[f"layers.{i}.o"] = "mamba.out_proj"
        layers[i] = replace(layers[i], mixer=mixer)
    decoder = replace(decoder, layers=tuple(layers))
    return architecture(decoder, "granite", names=names, fused=fused)


def _mamba(c: Config, s: Sizes) -> Mamba2:
    """Return the mixer of layers without attention."""
    heads, groups = (
        c.integer("mamba_n_heads", 128, most=MOST_WIDE),
        c.integer("mamba_n_groups", 1, most=MOST_WIDE),
    )
    width = c.integer("mamba_expand", 2, most=MOST_WIDE) * s.hidden
    if width % heads or heads % groups:
        raise c.wrong("mamba_n_heads", f'a multiple of "mamba_n_groups" ({groups}) that divides {width}')
    if c.values.get("mamba_d_head", "auto") == "auto":
        c.ignore("mamba_d_head")
    elif c.integer("mamba_d_head", most=MOST_WIDE) * heads != width:
        raise c.wrong(
            "mamba_d_head", f'{width // heads}, for {heads} heads of "mamba_expand" times the hidden size'
        )
    c.refuse("mamba_proj_bias", "only maps without biases can be built")
    limit = c.values.get("time_step_limit")
    if limit not in (None, *([0.0, top] for top in _UNLIMITED)):
        raise UnsupportedModel(f'{c.at}: "time_step_limit" is {shown(limit)}; only no limit can be built.')
    c.ignore("mamba_chunk_size")
    if c.activation("hidden_act", "silu") != "silu":
        raise c.wrong("hidden_act", '"silu", which the convolutions take as well')
    return Mamba2(
        heads=heads,
        head_dim=width // heads,
        state=c.integer("mamba_d_state", 256, most=MOST_WIDE),
        groups=groups,
        kernel=c.integer("mamba_d_conv", 4, least=2, most=64),
        norm=Norm(c.positive("rms_norm_eps", 1e-6, most=1.0)),
        conv_bias=c.flag("mamba_conv_bias", True),
    )


def _rows(mixer: Mamba2, layer: int) -> Sources:
    """Return where the maps of a Mamba-2 layer lie, as rows of one tensor, and its vectors."""
    module, at = f"model.layers.{layer}.mamba", f"layers.{layer}"
    first, second = mixer.width, mixer.width + mixer.mixed
    rows = {"z": (0, first), "in": (first, second), "a": (second, second + mixer.heads)}
    found = {
        f"{at}.{part}.weight": Source(f"{module}.in_proj.weight", rows=lie) for part, lie in rows.items()
    }
    for part, name in (("a_log", "A_log"), ("dt_bias", "dt_bias"), ("skip", "D")):
        found[f"{at}.{part}.weight"] = Source(f"{module}.{name}")
    return found


def _shared(layers: int, wide: int, prefix: str) -> Sources:
    """Return where gate and up lie, as rows."""
    found: Sources = {}
    for i in range(layers):
        tensor = f"model.layers.{i}.shared_mlp.input_linear.weight"
        found[f"layers.{i}.{prefix}gate.weight"] = Source(tensor, rows=(0, wide))
        found[f"layers.{i}.{prefix}up.weight"] = Source(tensor, rows=(wide, 2 * wide))
    return found
