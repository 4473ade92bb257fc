"""OLMo 3: OLMo 2 with a sliding window in three of four layers, and a rotation for each kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import olmo2
from ortlm.architectures._config import Config
from ortlm.architectures._keys import FULL, SLIDING, WithDefaults
from ortlm.architectures._parts import sizes
from ortlm.architectures._rope import from_parts
from ortlm.spec import Architecture

MODEL_TYPES = ("olmo3",)


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of an OLMo 3 checkpoint; the old ``rope_scaling`` is for full attention alone."""
    c = Config(config)
    s = sizes(c)
    both = c.part("rope_parameters") or Config({}, at=c.at)
    notes = _passed_over(both)
    full, old = both.part(FULL) or Config({}, at=c.at), c.part("rope_scaling")
    if old is not None:
        full = Config(WithDefaults(old.values, full.values), at=old.at)
    if not full.flag("truncate", True):
        # transformers passes over the key where rotation differs by layer.
        raise full.wrong("truncate", "true, or no such key")
    sliding = both.part(SLIDING) or Config({}, at=c.at)
    # An old file has one theta, which transformers gives to the first of the two that lacks one.
    theta = c.positive("rope_theta", 500_000.0)
    ropes = {
        FULL: from_parts(full, c, s.head_dim, max_tokens=s.max_tokens, theta=theta),
        SLIDING: from_parts(sliding, c, s.head_dim, max_tokens=s.max_tokens, theta=500_000.0),
    }
    if not c.has("sliding_window", 4096):
        raise c.wrong("sliding_window", "a number of tokens, for the layers that have a window")
    windows = {FULL: None, SLIDING: c.window(s.max_tokens, default=4096)}
    kinds = c.layer_types(s.layers, windowed=True) or [
        SLIDING if (i + 1) % 4 else FULL for i in range(s.layers)
    ]
    base = olmo2.describe(WithDefaults(config, {}, fixed={"rope_parameters": None, "rope_scaling": None}))
    layers = tuple(
        replace(layer, mixer=replace(mixer, rope=ropes[kind], window=windows[kind]))
        for layer, mixer, kind in zip(base.decoder.layers, base.decoder.attentions, kinds, strict=True)
    )
    return replace(base, decoder=replace(base.decoder, layers=layers), notes=(*base.notes, *notes))


def _passed_over(both: Config) -> list[str]:
    """Return what to say of rope keys that are not of one kind of layer, which transformers does not look at."""
    flat = {key: value for key, value in both.values.items() if key not in (FULL, SLIDING)}
    both.ignore(*flat)
    usual = {"rope_type": "default", "type": "default", "rope_theta": 500_000.0}
    if all(value is None or usual.get(key) == value for key, value in flat.items()):
        return []
    note = (
        f"{both.at}: {', '.join(flat)} for all layers are passed over, as transformers does in this family: "
        f'layers rotate by the keys under "{FULL}" and "{SLIDING}", or without scaling.'
    )
    return [note]
