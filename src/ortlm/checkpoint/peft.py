"""Reads a LoRA adapter as peft saves it: a folder with adapter_config.json and adapter_model.safetensors.

LoRA: Hu et al. 2021, arXiv:2106.09685; rank-stabilized scaling: Kalajdzievski 2023, arXiv:2312.03732; DoRA: Liu et
al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ortlm._utils.checked_json import Field, check, flag, integer, list_of, number, object_of, shown, text
from ortlm.checkpoint import files
from ortlm.checkpoint.patterns import Unbounded, matches
from ortlm.checkpoint.safetensors import FLOATS, Weight, check_finite, read_header, same
from ortlm.dtypes import Array
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What an adapter that cannot be read as it is can still be turned into.
_WAY_OUT = "Merge it with peft, merge_and_unload() and save_pretrained(), and build the merged model."
_TENSOR = re.compile(
    r"base_model\.model\.(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B)|(magnitude_vector)(?:\.weight)?)"
)
_SHIFT = re.compile(r"base_model\.model\.(.+)\.lora_B\.bias")
_WHOLE = re.compile(
    r"base_model\.model\.(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)"
)
# Keys that do not change what a trained adapter computes, or that are looked at below.
_KNOWN = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
        "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip
_MOST_RANK = 1 << 20
_rank, _alpha = integer(1, _MOST_RANK), number(0.0, 1e9)
# What is computed from; of the rest it matters only whether it is there.
_FIELDS: Mapping[str, Field] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "rank_pattern": object_of(_rank, most=10_000, default={}),
    "alpha_pattern": object_of(_alpha, most=10_000, default={}),
    "use_rslora": flag(default=False),
    "use_dora": flag(default=False),
    "lora_bias": flag(default=False),
    "modules_to_save": list_of(text(longest=500), most=10_000, default=[]),
}
# Other initialisations change the model's own weights before training: they differ from the checkpoint's.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Delta:
    """What a LoRA adds to a weight [out, in]: ``scale · b @ a``, with ``a`` [r, in] and ``b`` [out, r].

    ``looked_up``: of embeddings peft saves both the other way round, ``a`` [r, out] and ``b`` [in, r]. With
    ``magnitude`` [out] each row of the sum then gets that length, times what others added to it (DoRA).
    """

    a: Weight
    b: Weight
    scale: float
    looked_up: bool = False
    magnitude: Weight | None = None

    @property
    def rank(self) -> int:
        """How many directions it has."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that it changes."""
        if self.looked_up:
            return self.a.shape[1], self.b.shape[0]
        return self.b.shape[0], self.a.shape[1]

    @property
    def plain(self) -> bool:
        """Whether it is two products and no more, which a graph can add while it runs."""
        return not self.looked_up and self.magnitude is None

    def down(self) -> Array:
        """Return ``a``: float32 [r, in]."""
        weight = self.b if self.looked_up else self.a
        found = self.b.columns(0, self.rank) if self.looked_up else self.a.rows(0, self.rank)
        check_finite(found, weight)
        return found

    def up(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of ``scale · b``: float32 [stop - start, r]."""
        weight = self.a if self.looked_up else self.b
        found = self.a.columns(start, stop) if self.looked_up else self.b.rows(start, stop)
        check_finite(found, weight)
        return found * np.float32(self.scale)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of what is added: float32 [stop - start, in]."""
        found: Array = self.up(start, stop) @ self.down()
        return found

    def applied(self, rows: Array, base: Array, start: int) -> Array:
        """Return ``rows`` of the weight, from ``start`` on, with this; ``base`` is what they were at first."""
        added = self.rows(start, start + len(rows))
        if self.magnitude is None:
            return np.asarray(rows + added)
        length = self.magnitude.rows(start, start + len(rows))
        check_finite(length, self.magnitude)
        lengths = np.linalg.norm(base + added, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((length / lengths)[:, None] * (rows + added), np.float32)


@dataclass(frozen=True, slots=True)
class Shift:
    """What a LoRA's own bias adds to a bias: ``scale · values``."""

    values: Weight
    scale: float

    def applied(self, rows: Array, base: Array, start: int) -> Array:
        """Return ``rows`` with it; see ``Delta.applied``."""
        found = self.values.rows(start, start + len(rows))
        check_finite(found, self.values)
        return np.asarray(rows + found * np.float32(self.scale))


@dataclass(frozen=True, slots=True)
class Replacement:
    """A weight that was trained whole and takes the place of the model's own."""

    weight: Weight

    def rows(self, start: int, count: int) -> Array:
        """Return ``count`` rows from ``start`` on, as float32."""
        found = self.weight.rows(start, start + count)
        check_finite(found, self.weight)
        return found


Change = Delta | Shift | Replacement


@dataclass(frozen=True, slots=True)
class Lora:
    """What an adapter does to weights, by their names in the checkpoint: it adds, shifts biases, and replaces."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    shifts: dict[str, Shift] = field(default_factory=dict)
    whole: dict[str, Weight] = field(default_factory=dict)


def read_lora(folder: str | Path, base: Mapping[str, Weight]) -> Lora:
    """Return what the adapter in ``folder`` does to the weights of the checkpoint ``base``.

    Raises BadCheckpoint if files are missing, damaged or contradict each other, UnsupportedModel for another
    kind of adapter than a LoRA, BadOption for a file that is loaded when a model runs.
    """
    folder = Path(folder)
    _check_folder(folder)
    config = _config(folder)
    file = folder / WEIGHTS_FILE
    parts: dict[str, dict[str, Weight]] = {}
    found = Lora()
    for name, weight in read_header(folder, WEIGHTS_FILE).items():
        match, shift, whole = _TENSOR.fullmatch(name), _SHIFT.fullmatch(name), _WHOLE.fullmatch(name)
        if match is not None:
            part = match[2] or (f"embedding_{match[3]}" if match[3] else match[4])
            parts.setdefault(match[1], {})[part] = _checked(
                weight, 1 if part == "magnitude_vector" else 2, file
            )
        elif shift is not None and config["lora_bias"]:
            rank = _number(config, "rank", shift[1], file)
            found.shifts[f"{shift[1]}.bias"] = Shift(
                _checked(weight, 1, file), _scaling(config, shift[1], rank, file)
            )
        elif whole is not None and ".lora_" not in name:
            own = f"{whole[1]}.{whole[2]}"
            # peft saves the vocabulary's weights next to a LoRA on them, and all weights of modules_to_save.
            if own not in base or not same(weight, base[own]):
                found.whole[own] = weight
        else:
            raise UnsupportedModel(f"{file} holds the tensor {name!r}, {_what_it_is(name)}. {_WAY_OUT}")
    _check_saved(config, found, parts, read_header(folder, WEIGHTS_FILE), file)
    for module, tensors in parts.items():
        found.deltas[f"{module}.weight"] = _delta(module, tensors, config, file)
    if not (found.deltas or found.whole or found.shifts):
        raise BadCheckpoint(
            f"{file} holds no tensors that change anything, so the adapter does nothing. Save it again."
        )
    return found


def scaled(delta: Delta, weight: float) -> Delta:
    """Return ``delta`` with its scale times ``weight``."""
    return delta if weight == 1 else replace(delta, scale=delta.scale * weight)


def _checked(weight: Weight, axes: int, file: Path) -> Weight:
    if weight.dtype.name not in FLOATS or len(weight.shape) != axes or 0 in weight.shape:
        raise BadCheckpoint(
            f"{file}: tensor {weight.name!r} is {weight.dtype.safetensors} of shape {list(weight.shape)}; "
            f"expected a {'matrix' if axes == 2 else 'vector'} of BF16, F16 or F32."
        )
    return weight


def _check_saved(
    config: Mapping[str, Any],
    found: Lora,
    parts: Mapping[str, object],
    tensors: Mapping[str, Weight],
    file: Path,
) -> None:
    """Raise BadCheckpoint if a module that was trained whole is not there, or one is that was not to be."""
    for module in config["modules_to_save"]:
        if not any(f".{module}." in f"{name}." for name in tensors):
            raise BadCheckpoint(
                f"{file}: modules_to_save names {module!r}, of which there is no tensor. Save the adapter again."
            )
    if config["bias"] == "none" and not config["modules_to_save"]:
        for name, weight in found.whole.items():
            module = name.rpartition(".")[0]
            if module not in parts:
                raise BadCheckpoint(
                    f"{file}: tensor {weight.name!r} is a whole weight, and {CONFIG_FILE} has no modules_to_save. "
                    "One of the two belongs to another adapter."
                )


def _check_folder(folder: Path) -> None:
    if folder.suffix == ".onnx_adapter":
        raise BadOption(
            f"{folder} is an adapter for ONNX Runtime, which is loaded when a model runs. A build takes the "
            f"folder of a peft adapter, with {CONFIG_FILE}."
        )
    if not folder.is_dir():
        raise BadCheckpoint(
            f"{folder} is not a folder. Give the folder of a peft adapter, with {CONFIG_FILE}."
        )
    if not files.present(folder, CONFIG_FILE):
        raise BadCheckpoint(f"{folder} has no {CONFIG_FILE}, so it is not a peft adapter.")
    if not files.present(folder, WEIGHTS_FILE):
        pickled = files.present(folder, "adapter_model.bin")
        raise BadCheckpoint(
            f"{folder} has no {WEIGHTS_FILE}."
            + (" It has adapter_model.bin, a pickle, which may run any code when it is opened." * pickled)
            + " Load the adapter with peft and save it with save_pretrained(NEW_FOLDER)."
        )


def _config(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration. Raises UnsupportedModel for one that asks for more than a LoRA."""
    path, config = folder / CONFIG_FILE, files.read_object(folder, CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(
            f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is supported. {_WAY_OUT}"
        )
    wrong = {key: value for key, value in config.items() if key not in _KNOWN and value}
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        wrong["bias"] = config["bias"]
    if config.get("init_lora_weights") not in _STARTS:
        wrong["init_lora_weights"] = config["init_lora_weights"]
    for key, value in wrong.items():
        words = repr(value)
        raise UnsupportedModel(
            f"{path}: {key} is {words if len(words) < 80 else words[:80] + '…'}, which is not supported. "
            f"{_WAY_OUT}"
        )
    return check({"bias": "none", **config}, _FIELDS, file=path, error=BadCheckpoint, unknown="keep")


def _delta(module: str, parts: Mapping[str, Weight], config: Mapping[str, Any], file: Path) -> Delta:
    looked_up = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if looked_up else ("A", "B")
    for part, end in zip(names, ("",) * 2 if looked_up else (".weight",) * 2, strict=True):
        if part not in parts:
            raise BadCheckpoint(
                f"{file}: tensor 'base_model.model.{module}.lora_{part}{end}' is missing. Save the adapter again."
            )
    a, b = (parts[name] for name in names)
    rank = _number(config, "rank", module, file)
    if not a.shape[0] == b.shape[1] == rank:
        raise BadCheckpoint(
            f"{file}: {a.name!r} has shape {list(a.shape)} and {b.name!r} {list(b.shape)}, but {CONFIG_FILE} "
            f"gives the rank {rank:g}; expected [{rank:g}, in] and [out, {rank:g}]."
        )
    magnitude = parts.get("magnitude_vector")
    if bool(config["use_dora"]) != (magnitude is not None):
        raise BadCheckpoint(
            f"{file}: {module!r} has {'no' if magnitude is None else 'a'} lora_magnitude_vector, and "
            f"{CONFIG_FILE} says use_dora = {_json_word(config['use_dora'])}. One of the two belongs to another "
            "adapter."
        )
    if magnitude is not None and looked_up:
        raise UnsupportedModel(
            f"{file}: {magnitude.name!r} is DoRA on embeddings, whose lengths are those of channels over the "
            f"whole vocabulary; that is not supported. {_WAY_OUT}"
        )
    found = Delta(a, b, _scaling(config, module, rank, file), looked_up, magnitude)
    if magnitude is not None and magnitude.shape != found.shape[:1]:
        raise BadCheckpoint(
            f"{file}: {magnitude.name!r} has shape {list(magnitude.shape)}, expected [{found.shape[0]}]."
        )
    return found


def _json_word(value: object) -> str:
    """Return true or false as JSON has it."""
    return str(value).lower()


def _scaling(config: Mapping[str, Any], module: str, rank: float, file: Path) -> float:
    alpha = _number(config, "alpha", module, file)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(config: Mapping[str, Any], what: str, module: str, file: Path) -> float:
    """Return the rank or alpha of ``module``: of the first pattern that matches, else of the whole adapter."""
    value: Any = config.get({"rank": "r", "alpha": "lora_alpha"}[what])
    for pattern, special in (config.get(f"{what}_pattern") or {}).items():
        try:
            if matches(pattern, module):
                value = special
                break
        except Unbounded as error:
            raise BadCheckpoint(
                f"{file.parent / CONFIG_FILE}: {what}_pattern has {shown(pattern)}, which cannot be used as a "
                f"regular expression: {error}. {_WAY_OUT}"
            ) from error
    return float(value)


def _what_it_is(name: str) -> str:
    for part, what in (
        ("lora_B.bias", "a bias, and its configuration has no lora_bias"),
        ("token_adapter", "trained tokens, which are not supported"),
    ):
        if part in name:
            return what
    return "which is neither 'base_model.model.MODULE.lora_A.weight' nor '….lora_B.weight'"
