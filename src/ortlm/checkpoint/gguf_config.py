"""From the metadata and tensors of GGUF files to a config.json and the weights of a Hugging Face checkpoint.

A key of metadata that belongs to the model is read, known to change nothing, or refused by its name: passed over
it might give another model without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ortlm._utils.checked_json import shown
from ortlm.architectures._gguf import EXPERT_KEYS, KEYS, PARTS, TENSORS, Gguf
from ortlm.checkpoint.gguf_header import Numbers, TensorInfo
from ortlm.checkpoint.gguf_weights import TRAINED_IN, BlockWeight, kind_of
from ortlm.dtypes import BY_SAFETENSORS
from ortlm.errors import BadCheckpoint, UnsupportedModel

_FULL, _SLIDING = "full_attention", "sliding_attention"
_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
# Divisors of the rotation's frequencies, as tensors of their own.
_SAME, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_KV_HEADS = "attention.head_count_kv"
_MOST_PAIRS, _MOST_LAYERS = 1 << 14, 10_000
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z0-9_]+(?:\.[a-z0-9_]+)?)\.(weight|bias)")
_OTHER = re.compile(r"([a-z0-9_]+)\.(weight|bias)")
_LONE_EXPERT = re.compile(r"blk\.[0-9]+\.ffn_(gate|up|down)\.[0-9]+\.weight")
# One tensor with q, k and v one below the other, of families that have them apart.
_FUSED, _PARTS = "blk.attn_qkv", ("blk.attn_q", "blk.attn_k", "blk.attn_v")
# What says nothing of the computation: how embeddings are pooled, how a file was laid out.
_BOOKKEEPING = ("pooling_type", "tensor_data_layout", "vocab_size")
# What keys of other families say when they change nothing.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    # Whether the model was trained further after its context was extended.
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}


class _Keys:
    """The keys of metadata below a family's name; what was taken is known."""

    def __init__(self, metadata: Mapping[str, Any], form: Gguf, where: str) -> None:
        before = f"{form.name}."
        self._values = {
            key.removeprefix(before): value for key, value in metadata.items() if key.startswith(before)
        }
        self._form, self.where = form, where
        self._taken: set[str] = set()

    def take(self, key: str) -> Any:
        """Return the value of ``key``, of one for each layer the one that all have, or None if it is absent."""
        self._taken.add(key)
        value = self._values.get(key)
        if isinstance(value, Numbers):
            several = sorted(set(value.values.tolist()))
            if key == _KV_HEADS and self._form.without_heads:
                several = [number for number in several if number != 0]
            if len(several) != 1:
                raise self.refused(key, "differs from layer to layer, which is not supported in this family")
            return several[0]
        return value

    def whole(self, key: str) -> int | None:
        """Return a whole number above zero, or None if there is none."""
        found = self._number(key, int, "a whole number above zero")
        return None if found is None else int(found)

    def positive(self, key: str) -> float | None:
        """Return a number above zero, or None if there is none."""
        found = self._number(key, (int, float), "a number above zero")
        return None if found is None else float(found)

    def _number(self, key: str, kinds: Any, expected: str) -> Any:
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise self.wrong(key, expected)
        return value

    def layers(self, key: str, count: int) -> list[bool] | None:
        """Return for each of ``count`` layers whether ``key`` holds for it, None if it is absent.

        A number n stands for all layers but every n-th, 0 for all layers.
        """
        self._taken.add(key)
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, Numbers) and len(value) == count:
            return [bool(v) for v in value.values]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return [value == 0 or i % value < value - 1 for i in range(count)]
        raise self.wrong(key, f"a number, or a list of {count} values, one for each layer")

    def wrong(self, key: str, expected: str) -> BadCheckpoint:
        """Return the error that the value of ``key`` is not what is ``expected``."""
        found = shown(self._values[key]) if key in self._values else "missing"
        return BadCheckpoint(
            f'{self.where}: "{self._form.name}.{key}" is {found}, expected {expected}. The file is damaged; '
            "download it again."
        )

    def refused(self, key: str, reason: str) -> UnsupportedModel:
        """Return the error that ``key`` changes what is computed, in a way that is not known here."""
        return UnsupportedModel(
            f'{self.where}: "{self._form.name}.{key}" is {shown(self._values[key])}, which {reason}.'
        )

    def check_taken(self) -> None:
        """Raise UnsupportedModel for a key that was not taken and may change what the model computes."""
        for key, value in self._values.items():
            if key in self._taken or key in _BOOKKEEPING:
                continue
            if any(
                value == off and isinstance(value, bool) == isinstance(off, bool) for off in _OFF.get(key, ())
            ):
                continue
            raise self.refused(key, "may change what the model computes, and is not known in this family")


def gguf_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], form: Gguf, where: str
) -> dict[str, Any]:
    """Return what config.json says of the model that files of ``form`` hold; ``where`` names them in errors.

    ``tensors`` are those of all its files. Raises BadCheckpoint for values that cannot be, and UnsupportedModel
    for a key that may change what the model computes and is not known.
    """
    keys = _Keys(metadata, form, where)
    config: dict[str, Any] = {"model_type": form.model_type, **form.config}
    experts = EXPERT_KEYS if form.mixture else {}
    for key in experts:
        # What config.json need not say has other defaults in every family.
        if keys.whole(key) is None:
            raise keys.wrong(key, "a whole number above zero")
    for key, name in {**KEYS, **experts, **form.keys}.items():
        value = keys.take(key)
        if value is not None:
            config[name] = value
    for key, wanted in form.required.items():
        if keys.take(key) not in (None, wanted):
            raise keys.refused(key, f"is not supported in this family (only {shown(wanted)})")
    layers, heads = keys.whole("block_count"), keys.whole("attention.head_count")
    hidden, head_dim = keys.whole("embedding_length"), keys.whole("attention.key_length")
    if layers is not None and layers > _MOST_LAYERS:
        raise keys.wrong("block_count", f"at most {_MOST_LAYERS:,}")
    if layers is None or heads is None or hidden is None:
        missing = {"block_count": layers, "attention.head_count": heads, "embedding_length": hidden}
        raise keys.wrong(next(k for k, v in missing.items() if v is None), "a whole number above zero")
    keys.whole(_KV_HEADS)
    if form.without_heads:
        attends = keys.layers(_KV_HEADS, layers)
        if attends is None or not any(attends):
            raise keys.wrong(_KV_HEADS, f"a list of {layers} values, one for each layer")
        config["layer_types"] = [_FULL if each else form.without_heads for each in attends]
    if heads > hidden:
        raise keys.wrong("attention.head_count", f"at most the {hidden} channels of a token")
    if head_dim is None:
        head_dim = hidden // heads
    if keys.take("attention.value_length") not in (None, head_dim):
        raise keys.refused("attention.value_length", f"differs from the {head_dim} channels of a key")
    config["head_dim"] = head_dim
    if "sliding_window" in config:
        sliding = keys.layers("attention.sliding_window_pattern", layers)
        if sliding is not None:
            config["layer_types"] = [_SLIDING if s else _FULL for s in sliding]
    config |= _rope(keys, config, tensors, head_dim)
    config["vocab_size"] = _vocab(metadata, tensors, form, where)
    config["tie_word_embeddings"] = _HEAD not in tensors
    config |= {name: f"blk.0.{tensor}" in tensors for name, tensor in form.present.items()}
    config |= form.finish(config)
    keys.check_taken()
    for name in tensors:
        if _LONE_EXPERT.fullmatch(name):
            raise UnsupportedModel(
                f"{where} has a tensor for each expert ({name}), as llama.cpp wrote them until April 2024, and "
                "ortlm reads all experts of a layer from one. Convert the model again with a current llama.cpp."
            )
    return config


def _vocab(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], form: Gguf, where: str) -> int:
    info = tensors.get(_EMBEDDINGS)
    if info is None:
        raise BadCheckpoint(
            f"{where} has no tensor {_EMBEDDINGS}, so it is no language model, or a part of one. Give the first "
            "of all its parts."
        )
    stated = metadata.get(f"{form.name}.vocab_size", info.shape[0])
    if stated != info.shape[0]:
        raise BadCheckpoint(
            f'{where}: "{form.name}.vocab_size" is {shown(stated)}, and {_EMBEDDINGS} has {info.shape[0]:,} '
            "rows. The file is damaged; download it again."
        )
    return info.shape[0]


def _rope(
    keys: _Keys, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], head_dim: int
) -> dict[str, Any]:
    """Return the keys of rotation: which channels rotate, and what was done for longer contexts."""
    found: dict[str, Any] = {}
    dims = keys.whole("rope.dimension_count")
    if dims is not None and dims != head_dim:
        found["partial_rotary_factor"] = dims / head_dim
    pairs = (dims or head_dim) // 2
    kind, factor = keys.take("rope.scaling.type"), keys.positive("rope.scaling.factor")
    linear, attention = keys.positive("rope.scale_linear"), keys.positive("rope.scaling.attn_factor")
    original = keys.whole("rope.scaling.original_context_length")
    tables = {name: _table(tensors[name], pairs) for name in (_SAME, _LONG, _SHORT) if name in tensors}
    if tables:
        if kind not in (None, "none", "longrope") or linear not in (None, 1):
            raise keys.refused(
                "rope.scaling.type", "does not go with the table of frequencies that the file has"
            )
        if (_LONG in tables) != (_SHORT in tables) or len(tables) == 3:
            raise BadCheckpoint(
                f"{keys.where} has the tables {', '.join(tables)}, expected {_SAME} or both others. "
                "It is damaged; download it again."
            )
        scaling: dict[str, Any] = {"rope_type": "longrope"}
        if _SAME in tables:
            # The same divisors at every length.
            scaling |= {"short_factor": tables[_SAME], "long_factor": tables[_SAME], "attention_factor": 1.0}
            length = config.get("max_position_embeddings")
            return found | {"rope_scaling": scaling | {"original_max_position_embeddings": length}}
        scaling |= {"short_factor": tables[_SHORT], "long_factor": tables[_LONG]}
        if attention is not None:
            scaling["attention_factor"] = attention
        if original is not None and "original_max_position_embeddings" not in config:
            scaling["original_max_position_embeddings"] = original
        return found | {"rope_scaling": scaling}
    if kind == "longrope":
        raise BadCheckpoint(
            f"{keys.where} says that its rotation is longrope, and has no {_LONG}. It is damaged; "
            "download it again."
        )
    if attention not in (None, 1):
        raise keys.refused("rope.scaling.attn_factor", "is not known without tables of frequencies")
    if kind is None and (linear or factor or 1) != 1:
        kind = "linear"
    if kind in (None, "none"):
        return found
    if kind == "linear":
        return found | {"rope_scaling": {"rope_type": "linear", "factor": factor or linear or 1.0}}
    if kind != "yarn":
        raise keys.refused("rope.scaling.type", "is not known (none, linear, yarn, longrope)")
    return found | {"rope_scaling": _yarn(keys, factor, original)}


def _yarn(keys: _Keys, factor: float | None, original: int | None) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor or 1.0}
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        value = keys.positive(f"rope.scaling.{key}")
        if value is not None:
            scaling[name] = value
    for key in ("yarn_ext_factor", "yarn_attn_factor"):
        if keys.take(f"rope.scaling.{key}") not in (None, 1.0):
            raise keys.refused(f"rope.scaling.{key}", "is not supported (only 1)")
    return scaling


def _table(info: TensorInfo, pairs: int) -> list[float]:
    weight = _weight(info, info.name)
    if info.shape != (pairs,) or pairs > _MOST_PAIRS:
        raise BadCheckpoint(
            f"weight {shown(info.name)} in {info.stamp.path.name} has the shape {list(info.shape)}, expected "
            f"[{pairs}], one value for each pair of channels that rotate. The file is damaged; download it again."
        )
    values = weight.rows(0, pairs)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise BadCheckpoint(
            f"weight {shown(info.name)} in {info.stamp.path.name} has a value that is no number above zero. The "
            "file is damaged; download it again."
        )
    return [float(v) for v in values]


def _weight(info: TensorInfo, name: str, *, added: float = 0.0, heads: int | None = None) -> BlockWeight:
    if heads is not None and info.shape[0] % (2 * heads):
        raise BadCheckpoint(
            f"weight {shown(info.name)} in {info.stamp.path.name} has {info.shape[0]:,} rows, which {heads} "
            "heads cannot share evenly. The file is damaged; download it again."
        )
    stored = kind_of(info)
    return BlockWeight(
        name=name,
        shape=info.shape,
        dtype=BY_SAFETENSORS["F32"],
        stamp=info.stamp,
        offset=info.offset,
        added=added,
        kind=stored,
        calibrated=stored in TRAINED_IN,
        stored_name=info.name,
        heads=heads,
    )


def gguf_weights(
    tensors: Mapping[str, TensorInfo], form: Gguf, config: Mapping[str, Any]
) -> dict[str, BlockWeight]:
    """Return the tensors by the names that a Hugging Face checkpoint has for them.

    Those in ``PARTS`` get the spec's. One that is not known keeps its name, so that it is missed nowhere. Raises
    UnsupportedModel for types that are not read, and BadCheckpoint for tensors that lie beyond their file.
    """
    names = {**TENSORS, **form.tensors}
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    rows = tuple(n * int(config["head_dim"]) for n in (heads, kv_heads, kv_heads))
    found: dict[str, BlockWeight] = {}
    for info in tensors.values():
        if info.name in (_SAME, _LONG, _SHORT):
            continue
        layer, part, kind = _taken_apart(info.name)
        before = f"model.layers.{layer}." if layer else ""
        halves = dict(zip(_PARTS[:2], (heads, kv_heads), strict=True)) if form.interleaved else {}
        added = form.norm_add if part.endswith("norm") and kind == "weight" else 0.0
        if part == _FUSED and part not in names:
            found |= {
                f"{before}{names[each]}.{kind}": weight
                for each, weight in zip(_PARTS, _split(info, rows, halves), strict=True)
            }
        elif part in PARTS:
            name = f"layers.{layer}.{PARTS[part]}.{kind}"
            found[name] = _weight(info, name)
        elif part in names:
            name = f"{before}{names[part]}.{kind}"
            found[name] = _weight(info, name, added=added, heads=halves.get(part))
        else:
            found[info.name] = _weight(info, info.name)
    return found


def _taken_apart(name: str) -> tuple[str, str, str]:
    """Return layer, part and kind of the tensor ``name``; the part is empty where the name follows no rule."""
    inside, outside = _LAYER.fullmatch(name), _OTHER.fullmatch(name)
    if inside:
        return inside[1], f"blk.{inside[2]}", inside[3]
    return ("", outside[1], outside[2]) if outside else ("", "", "")


def _split(info: TensorInfo, rows: tuple[int, ...], halves: Mapping[str, int]) -> list[BlockWeight]:
    """Return q, k and v of a tensor that has them one below the other."""
    if info.shape[0] != sum(rows):
        raise BadCheckpoint(
            f"weight {shown(info.name)} in {info.stamp.path.name} has {info.shape[0]:,} rows, expected "
            f"{' + '.join(map(str, rows))} for q, k and v. The file is damaged; download it again."
        )
    found, first = [], 0
    for part, count in zip(_PARTS, rows, strict=True):
        cut = replace(info, shape=(count, *info.shape[1:]))
        found.append(replace(_weight(cut, info.name, heads=halves.get(part)), first=first))
        first += count
    return found
