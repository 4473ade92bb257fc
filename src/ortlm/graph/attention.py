"""Attention with a cache, through ONNX Runtime's GroupQueryAttention."""

from __future__ import annotations

from dataclasses import dataclass

from ortlm.dtypes import Array
from ortlm.errors import BadOption, UnsupportedModel
from ortlm.graph.builder import MICROSOFT, Builder, Value
from ortlm.graph.linear import Parameters, linear, node_path
from ortlm.graph.norm import norm, unit_norm
from ortlm.graph.rope import RopeTables, rotate
from ortlm.graph.step import Step
from ortlm.spec import Attention, Norm

# The first ONNX Runtimes whose GroupQueryAttention is right for windows and sinks, an int8 cache, one that evicts,
# and lengths per row. 1.23 attends to another window; 1.25 and 1.26 load a graph with an int8 cache and cannot run
# it, 1.27 is wrong for rows of different lengths.
_WINDOW = (1, 24)
INT8_CACHE = (1, 28)
_WINDOW_CACHE = (1, 29)
_QUERY_LENGTHS = (1, 32)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """The keys and values of one layer, each [B, K, length, D]; keys are stored rotated."""

    key: Value
    value: Value


@dataclass(frozen=True, slots=True)
class SharedKeyValue:
    """The keys and values of one layer, as a later layer attends to them too.

    ``new`` are those of the new tokens, [B, S, K · D] each, as GroupQueryAttention takes them; None where they are
    in one value with the queries.
    """

    past: KeyValue
    new: KeyValue | None
    present: KeyValue


@dataclass(frozen=True, slots=True)
class CacheScales:
    """What one step of an int8 cache means, for keys and values of one layer: number = code · scale.

    float32, both of shape [1, K, 1, D] (a scale for each channel) or both of shape [1].
    """

    key: Array
    value: Array


def attention(
    g: Builder,
    spec: Attention,
    x: Value,
    past: KeyValue | None,
    *,
    layer: int,
    step: Step,
    tables: RopeTables,
    parameters: Parameters,
    hidden: int,
    scales: CacheScales | None = None,
    shares: bool = False,
    shared: SharedKeyValue | None = None,
) -> tuple[Value, SharedKeyValue]:
    """Attend ``x`` [B, S, H] to all positions so far; returns [B, S, N · D], before the output projection.

    With ``scales``, ``past`` and what is returned of the cache are int8. ``shares``: later layers attend to its
    keys and values, too. ``shared`` are those of the earlier layer that ``spec`` names.
    """
    if spec.head_dim % 8:
        raise UnsupportedModel(
            f"attention heads of size {spec.head_dim} cannot run: GroupQueryAttention needs a multiple of 8."
        )
    if spec.softcap and "softcap" in g.target.attention_ignores:
        raise BadOption(
            f"this model caps attention scores (at {spec.softcap:g}), which attention on {g.target.name} ignores "
            "without a word, so that the output would be wrong. Build it with -e cpu, cuda or mobile instead."
        )
    if spec.sinks and step.same_image() is not None:
        raise UnsupportedModel("attention sinks together with images whose tokens see each other cannot run.")
    at, module = f"layers.{layer}", f"layers.{layer}.attn"
    path = node_path(module)
    wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    inputs = ("batch_size", "sequence_length", hidden)
    rope = spec.rope
    mutual = step.same_image()
    turned = None if rope is None else step.turned(rope)
    # Queries are needed rotated where attention is computed in another way too. Tables of which positions choose
    # the part need attention that looks at positions.
    inside = (
        mutual is None
        and turned is None
        and rope is not None
        and g.target.rotary_inside
        and (rope.long_inv_freq is None or "positions" not in g.target.attention_ignores)
        and spec.head_dim % 16 == 0
        and (rope.dims // 2) % 8 == 0
        and not spec.qk_norm_late
    )
    q: Value
    k: Value | None
    v: Value | None
    parts = "q" if shared is not None else "qk" if spec.values_are_keys else "qkv"
    if shared is not None:
        assert shared.new is not None
        [q] = linear(
            g, x, [f"{at}.q"], parameters=parameters, module=f"{module}.q_proj", shape=inputs, layer=layer
        )
        k, v = shared.new.key, shared.new.value
    elif g.target.packed_projections:
        normed = spec.qk_norm is not None or spec.v_norm is not None or spec.values_are_keys
        scaled = spec.query_scale is not None
        apart = mutual is not None or normed or scaled or spec.gated or (rope is not None and not inside)
        apart = apart or shares
        q, *others = linear(
            g, x, [f"{at}.{p}" for p in parts],
            parameters=parameters, module=f"{module}.qkv_proj", shape=inputs, layer=layer, apart=apart,
        )  # fmt: skip
        k, v = (others[0], others[-1]) if others else (None, None)
    else:
        q, k, *others = (
            linear(
                g, x, [f"{at}.{p}"],
                parameters=parameters, module=f"{module}.{p}_proj", shape=inputs, layer=layer,
            )[0]
            for p in parts
        )  # fmt: skip
        v = others[0] if others else k
    if spec.v_norm is not None and v is not None and shared is None:
        v = _value_norm(g, v, spec, spec.v_norm, f"{module}.v_norm")
    gate: Value | None = None
    if spec.gated:
        q, gate = _gates(g, q, spec, path)
    own = shared is None
    if not spec.qk_norm_late:
        q, k = _head_norms(g, q, k, spec, at, parameters, module, own=own)
    cos = sin = positions = None
    if rope is not None:
        if inside:
            cos, sin = tables(rope)
            positions = step.switched(rope)
        elif k is not None:
            where, rows = turned or (step.switched(rope) or step.positions(), tables(rope))
            q = rotate(g, q, where, rows, rope, heads=spec.heads, head_dim=spec.head_dim, path=f"{path}/q")
            if own:
                k = rotate(
                    g, k, where, rows, rope, heads=spec.kv_heads, head_dim=spec.head_dim, path=f"{path}/k"
                )
    if spec.qk_norm_late:
        q, k = _head_norms(g, q, k, spec, at, parameters, module, own=own)
    if spec.query_scale is not None:
        # Rotation does not change lengths, so it may come after.
        scale = step.query_scale(spec.query_scale)
        q = g.op("Mul", q, scale, shape=("batch_size", "sequence_length", wide), name=f"{path}/q_scale")
    shape = ("batch_size", spec.kv_heads, cache_lengths(g, spec)[1], spec.head_dim)
    kind = g.dtype if scales is None else "int8"
    sinks = g.weight(parameters[f"{at}.sinks.weight"]) if spec.sinks else None
    key_scale = value_scale = None
    if scales is not None:
        key_scale = g.constant(scales.key, f"{module}.key_scale")
        value_scale = g.constant(scales.value, f"{module}.value_scale")
    for used, since in (
        (spec.window is not None or spec.sinks, _WINDOW),
        (scales is not None, INT8_CACHE),
        (evicts(g, spec), _WINDOW_CACHE),
        (step.query_lengths is not None, _QUERY_LENGTHS),
    ):
        if used:
            g.need(since)

    def attend(
        k: Value | None, v: Value | None, cache: KeyValue, lengths: Value | None, *, keep: bool = True
    ) -> list[Value]:
        kept: list[tuple[str, tuple[int | str, ...]]] = [(kind, shape)] * 2 if keep else []
        return g.ops(
            "GroupQueryAttention",
            [
                q, k, v, cache.key, cache.value, step.last_key, step.total,
                cos if inside else None, sin if inside else None, positions,
                None, sinks, key_scale, value_scale, None, None, lengths,
            ],
            outputs=[(g.dtype, ("batch_size", "sequence_length", wide)), *kept],
            name=path,
            domain=MICROSOFT,
            attributes={
                "num_heads": spec.heads,
                "kv_num_heads": spec.kv_heads,
                "scale": spec.scale,
                "local_window_size": spec.window or -1,
                "softcap": spec.softcap,
                "do_rotary": int(inside),
                "rotary_interleaved": int(rope is not None and rope.interleaved),
                **_cache_attributes(scales),
                **({"sliding_window_cache": 1} if evicts(g, spec) else {}),
            },
        )  # fmt: skip

    given = shared.past if shared is not None else past
    assert given is not None
    ragged = step.ragged() if shared is not None and g.target.shared_kv and scales is None else None
    if shared is not None and ragged is not None:
        # Without new keys the operator attends to the cache as it is and copies nothing, but takes no lengths.
        present, lengths = shared.present, step.query_lengths

        def again() -> list[Value]:
            return attend(k, v, given, lengths)[:1]

        def as_it_is() -> list[Value]:
            bounds = (g.integers(0), g.integers(0), g.integers(1))
            no_k, no_v = (
                g.op("Slice", x, *bounds, shape=("batch_size", 0, narrow), name=path) for x in (k, v)
            )
            return attend(no_k, no_v, present, None, keep=False)

        [y] = g.choose(ragged, again, as_it_is, shapes=[("batch_size", "sequence_length", wide)], name=path)
    elif shared is not None:
        # The same keys are appended to the same cache again, and what comes of it is not kept.
        present, [y, *_] = shared.present, attend(k, v, given, step.query_lengths)
    else:
        y, key, value = attend(k, v, given, step.query_lengths)
        present = KeyValue(key, value)
    if mutual is not None:
        attended, out = y, ("batch_size", "sequence_length", wide)
        [y] = g.choose(
            mutual,
            lambda: [_mutual(g, spec, q, present, step, path)],
            lambda: [g.op("Identity", attended, shape=out, name=path)],
            shapes=[out],
            name=path,
        )
    if gate is not None:
        flat = ("batch_size", "sequence_length", wide)
        gate = g.op("Sigmoid", gate, shape=flat, name=f"{path}/gate")
        y = g.op("Mul", y, gate, shape=flat, name=f"{path}/gate")
    new = KeyValue(k, v) if k is not None and v is not None else None
    return y, SharedKeyValue(given, new, present)


def _gates(g: Builder, q: Value, spec: Attention, path: str) -> list[Value]:
    """Return queries and their gates, [B, S, N · D] each, which ``q`` [B, S, N · 2 D] has head by head."""
    path, lead = f"{path}/gate", ("batch_size", "sequence_length")
    both = g.op(
        "Reshape", q, g.integers(0, 0, spec.heads, 2 * spec.head_dim),
        shape=(*lead, spec.heads, 2 * spec.head_dim), name=path,
    )  # fmt: skip
    halves = g.ops(
        "Split",
        [both, g.integers(spec.head_dim, spec.head_dim)],
        outputs=[(g.dtype, (*lead, spec.heads, spec.head_dim))] * 2,
        name=path,
        attributes={"axis": -1},
    )
    flat = g.integers(0, 0, spec.width)
    return [g.op("Reshape", half, flat, shape=(*lead, spec.width), name=path) for half in halves]


def _mutual(g: Builder, spec: Attention, q: Value, present: KeyValue, step: Step, path: str) -> Value:
    """Attend rotated queries [B, S, N · D] to the cache, in which an image's tokens see all of it."""
    path, heads, size = f"{path}/mutual", spec.heads, spec.head_dim
    shape = ("batch_size", "sequence_length", heads, size)
    q = g.op("Reshape", q, g.integers(0, 0, heads, size), shape=shape, name=path)
    q = g.op(
        "Transpose", q, shape=("batch_size", heads, "sequence_length", size), name=path, perm=(0, 2, 1, 3)
    )
    # The buffer of the cache may be longer than what is in it.
    end = g.cast(step.total, "int64", (), path)
    end = g.op("Unsqueeze", end, g.integers(0), shape=(1,), dtype="int64", name=path)
    used = ("batch_size", spec.kv_heads, "total_sequence_length", size)
    k, v = (
        g.op("Slice", x, g.integers(0), end, g.integers(2), shape=used, name=path)
        for x in (present.key, present.value)
    )
    y = g.op(
        "Attention", q, k, v, step.mutual_mask(spec.window),
        shape=("batch_size", heads, "sequence_length", size), name=path, scale=spec.scale, softcap=spec.softcap,
    )  # fmt: skip
    y = g.op("Transpose", y, shape=shape, name=path, perm=(0, 2, 1, 3))
    return g.op(
        "Reshape",
        y,
        g.integers(0, 0, heads * size),
        shape=("batch_size", "sequence_length", heads * size),
        name=path,
    )


def _cache_attributes(scales: CacheScales | None) -> dict[str, int | str]:
    """Return the attributes of an int8 cache; ONNX Runtime's CPU kernel wants keys and values alike."""
    if scales is None:
        return {}
    kind = "PER_TENSOR" if scales.key.size == 1 else "PER_CHANNEL"
    return {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}


def evicts(g: Builder, spec: Attention) -> bool:
    """Return whether the cache holds the window only."""
    return g.target.window_cache and spec.window is not None


def cache_lengths(g: Builder, spec: Attention) -> tuple[str, str]:
    """Return the names of the lengths of past and present."""
    return (
        ("window_capacity", "window_capacity")
        if evicts(g, spec)
        else ("past_sequence_length", "total_sequence_length")
    )


def _head_norms(
    g: Builder,
    q: Value,
    k: Value | None,
    spec: Attention,
    at: str,
    parameters: Parameters,
    module: str,
    *,
    own: bool,
) -> tuple[Value, Value | None]:
    """Normalize queries, and keys that are its ``own``, if ``spec`` says so.

    Only where they are not apart is ``k`` None.
    """
    kind = spec.qk_norm
    if kind is None or k is None:
        return q, k
    q = _head_norm(g, q, spec, kind, f"{at}.q_norm", spec.heads, parameters, f"{module}.q_norm")
    if own:
        k = _head_norm(g, k, spec, kind, f"{at}.k_norm", spec.kv_heads, parameters, f"{module}.k_norm")
    return q, k


def _value_norm(g: Builder, x: Value, spec: Attention, kind: Norm, module: str) -> Value:
    """Normalize values [B, S, K · D] over each head."""
    width, path = spec.kv_heads * spec.head_dim, node_path(module)
    split = ("batch_size", "sequence_length", spec.kv_heads, spec.head_dim)
    x = g.op("Reshape", x, g.integers(0, 0, spec.kv_heads, spec.head_dim), shape=split, name=path)
    x = unit_norm(g, x, kind, spec.head_dim, module=module, shape=split)
    return g.op(
        "Reshape", x, g.integers(0, 0, width), shape=("batch_size", "sequence_length", width), name=path
    )


def _head_norm(
    g: Builder,
    x: Value,
    spec: Attention,
    kind: Norm,
    name: str,
    heads: int,
    parameters: Parameters,
    module: str,
) -> Value:
    """Normalize queries or keys [B, S, heads · D], over each head or over the whole width."""
    width = heads * spec.head_dim
    flat = ("batch_size", "sequence_length", width)
    if spec.qk_norm_full:
        return norm(g, x, kind, name, parameters=parameters, module=module, shape=flat)
    split = ("batch_size", "sequence_length", heads, spec.head_dim)
    path = node_path(module)
    x = g.op("Reshape", x, g.integers(0, 0, heads, spec.head_dim), shape=split, name=path)
    if not spec.qk_norm_apart:
        x = norm(g, x, kind, name, parameters=parameters, module=module, shape=split)
        return g.op("Reshape", x, g.integers(0, 0, width), shape=flat, name=path)
    x = unit_norm(g, x, kind, spec.head_dim, module=module, shape=split)
    x = g.op("Reshape", x, g.integers(0, 0, width), shape=flat, name=path)
    return g.op("Mul", x, g.weight(parameters[f"{name}.weight"]), shape=flat, name=path)
