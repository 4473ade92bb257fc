"""Rotary embedding: final frequencies from either generation of config keys.

transformers 4 wrote ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` side by side;
transformers 5 writes one object ``rope_parameters``. The arithmetic is float32, in the order of
https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py,
because position 100,000 turns a difference in the last bit of a frequency into a visible angle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.architectures._config import Config
from ortlm.architectures._keys import quoted
from ortlm.errors import BadCheckpoint, UnsupportedModel
from ortlm.spec import Rope

Frequencies = NDArray[np.float32]

_BEYOND = (
    "config.json: the keys of rotary embedding give frequencies that are beyond float32. Compare the file with "
    "the original of the model."
)
_LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
_KEYS = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate", "type",
)  # fmt: skip
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def rope(
    config: Config,
    head_dim: int,
    *,
    max_tokens: int,
    theta: float = 10_000.0,
    partial: float | None = None,
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
    kinds: tuple[str, ...] = KINDS,
    interleaved: bool = False,
) -> Rope:
    """Return the rotary embedding that ``config`` states, for heads of ``head_dim`` channels.

    ``theta``, ``partial`` (the rotated fraction of a head) and ``original`` (the length before context was
    extended) are what the family assumes where keys are absent; with ``partial`` None all channels rotate.
    ``aliases`` are other spellings of a rope type, ``kinds`` the types that the family knows; for ``interleaved``
    see ``Rope``. Raises ``UnsupportedModel`` for an unknown rope type.
    """
    scaling = keys_of(config)
    # Of the two generations of keys, the older one wins as a whole.
    config.ignore("rope_parameters")
    found = from_parts(
        scaling,
        config,
        head_dim,
        max_tokens=max_tokens,
        theta=config.positive("rope_theta", theta),
        partial=partial,
        original=original,
        aliases=aliases,
        kinds=kinds,
    )
    return replace(found, interleaved=interleaved)


def keys_of(config: Config) -> Config:
    """Return the object of rope keys that counts, which may be empty."""
    scaling = config.part("rope_scaling")
    return scaling or config.part("rope_parameters") or Config({}, at=config.at)


def from_parts(
    scaling: Config,
    config: Config,
    head_dim: int,
    *,
    max_tokens: int,
    theta: float,
    partial: float | None = None,
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> Rope:
    """Return the rotary embedding of one object of rope keys, ``scaling``; see ``rope``."""
    nested = [key for key in _LAYER_KINDS if isinstance(scaling.values.get(key), Mapping)]
    if nested:
        raise UnsupportedModel(
            f"{scaling.at} differs by layer type ({', '.join(nested)}), unknown in this family."
        )
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    kind = {"su": "longrope", **(aliases or {})}.get(kind, kind)
    if kind not in kinds:
        raise UnsupportedModel(
            f'{scaling.at}: "rope_type" is {quoted(kind)}, which is not supported. Known: {", ".join(kinds)}.'
        )
    if kind == "proportional":
        return _proportional(scaling, head_dim, theta=scaling.positive("rope_theta", theta))
    # Each kind looks at its own, and none at the others'.
    scaling.ignore(*_KEYS)
    config.ignore("partial_rotary_factor", "original_max_position_embeddings")
    keys = _Parts(
        scaling,
        theta=scaling.positive("rope_theta", theta),
        dims=_dims(scaling, config, head_dim, partial),
        max_tokens=max_tokens,
        # What stands next to them wins, and where a family has a length of its own, that does too: as there.
        original=config.integer(
            "original_max_position_embeddings",
            original or scaling.integer("original_max_position_embeddings", max_tokens),
        ),
    )
    if kind in ("dynamic", "yarn") and "factor" not in scaling.values:
        raise scaling.wrong("factor", f'a number > 0, for "rope_type" "{kind}"')
    # What is beyond float32 is told at the end.
    with np.errstate(all="ignore"):
        try:
            return _of_kind(kind, keys)
        except (ArithmeticError, ValueError) as error:
            raise BadCheckpoint(_BEYOND) from error


def _proportional(scaling: Config, head_dim: int, *, theta: float) -> Rope:
    """Rotate the first channels of each half, with the frequencies of a whole head, and leave the others."""
    fraction = scaling.positive("partial_rotary_factor", 1.0, most=1.0)
    factor = np.float32(scaling.positive("factor", 1.0))
    turned = int(fraction * head_dim // 2)
    exponents = np.arange(0, 2 * turned, 2).astype(np.float32) / np.float32(head_dim)
    inv_freq = np.zeros(head_dim // 2, np.float32)
    powers = np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
    inv_freq[:turned] = np.float32(1.0) / powers
    return Rope(_floats(inv_freq / factor))


def _of_kind(kind: str, keys: _Parts) -> Rope:
    scaling = keys.scaling
    if kind == "longrope":
        return _longrope(keys)
    if kind == "yarn":
        return _yarn(keys)
    inv_freq = np.float32(1.0) / _powers(keys)
    # Dynamic scaling starts beyond max_position_embeddings, and that is where the context ends.
    if kind == "linear":
        inv_freq = inv_freq / np.float32(scaling.positive("factor"))
    elif kind == "llama3":
        inv_freq = _llama3(keys, inv_freq)
    return Rope(_floats(inv_freq))


@dataclass(frozen=True, slots=True)
class _Parts:
    scaling: Config
    theta: float
    dims: int
    max_tokens: int
    original: int


def _dims(scaling: Config, config: Config, head_dim: int, partial: float | None) -> int:
    place = scaling if scaling.values.get("partial_rotary_factor") is not None else config
    fraction = place.positive("partial_rotary_factor", partial or 1.0)
    dims = int(head_dim * fraction)
    if fraction > 1.0 or dims % 2 or not dims:
        raise place.wrong(
            "partial_rotary_factor", f"a fraction of head_dim {head_dim} that is an even number"
        )
    if partial is None and fraction != 1.0:
        raise UnsupportedModel(f'{place.at}: "partial_rotary_factor" is {fraction}, unknown in this family.')
    return dims


def _powers(keys: _Parts) -> Frequencies:
    """Return theta ** (2 i / dims)."""
    exponents = np.arange(0, keys.dims, 2).astype(np.float32) / np.float32(keys.dims)
    # The power in float64, rounded once: within one unit of any float32 implementation.
    return np.power(float(keys.theta), exponents.astype(np.float64)).astype(np.float32)


def _llama3(keys: _Parts, inv_freq: Frequencies) -> Frequencies:
    """Slow frequencies are divided by ``factor``, fast ones kept, those between blended."""
    factor = np.float32(keys.scaling.positive("factor"))
    low = keys.scaling.positive("low_freq_factor")
    high = keys.scaling.positive("high_freq_factor")
    if high <= low:
        raise keys.scaling.wrong("high_freq_factor", f'more than "low_freq_factor" ({low:g})')
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(keys.original) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1.0) - smooth) * inv_freq / factor + smooth * inv_freq
    slow, fast = wavelength > keys.original / low, wavelength < keys.original / high
    return np.where(slow, inv_freq / factor, np.where(fast, inv_freq, blended)).astype(np.float32)


def _yarn(keys: _Parts) -> Rope:
    """Blend of kept and divided frequencies by a ramp over channels: https://arxiv.org/abs/2309.00071."""
    scaling = keys.scaling
    factor = scaling.positive("factor", keys.max_tokens / keys.original)
    fast, slow = scaling.positive("beta_fast", 32.0), scaling.positive("beta_slow", 1.0)

    def channel(turns: float) -> float:
        return keys.dims * math.log(keys.original / (turns * 2 * math.pi)) / (2 * math.log(keys.theta))

    low, high = channel(fast), channel(slow)
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, keys.dims - 1)
    if low == high:
        high += 0.001
    steps = np.arange(keys.dims // 2, dtype=np.float32)
    ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))
    powers = _powers(keys)
    keep = np.float32(1) - ramp
    inv_freq = np.float32(1) / (np.float32(factor) * powers) * (np.float32(1) - keep)
    inv_freq = inv_freq + np.float32(1) / powers * keep

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = mscale(1.0)
    over, under = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    if over and under:
        attention = mscale(over) / mscale(under)
    return Rope(_floats(inv_freq), factor=scaling.positive("attention_factor", attention))


def _longrope(keys: _Parts) -> Rope:
    """Two tables of divisors: one up to the original length, one beyond: https://arxiv.org/abs/2402.13753."""
    scaling, powers = keys.scaling, _powers(keys)

    def table(key: str) -> tuple[float, ...]:
        divisors = np.array(scaling.positives(key, length=keys.dims // 2), np.float32)
        return _floats(np.float32(1) / (divisors * powers))

    stretch = scaling.positive("factor", keys.max_tokens / keys.original)
    attention = math.sqrt(1 + math.log(stretch) / math.log(keys.original)) if stretch > 1 else 1.0
    attention = scaling.positive("attention_factor", attention)
    long_inv_freq = table("long_factor")
    if keys.max_tokens <= keys.original:
        return Rope(table("short_factor"), factor=attention)
    return Rope(
        table("short_factor"),
        factor=attention,
        long_inv_freq=long_inv_freq,
        long_factor=attention,
        switch_tokens=keys.original,
    )


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise BadCheckpoint(_BEYOND)
    return tuple(float(x) for x in narrow)
