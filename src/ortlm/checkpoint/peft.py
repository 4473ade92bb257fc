"""Reads a LoRA adapter as peft saves it: a folder with adapter_config.json and adapter_model.safetensors.

LoRA: Hu et al. 2021, arXiv:2106.09685; rank-stabilized scaling: Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ortlm._utils.checked_json import Field, check, flag, integer, number, object_of, shown
from ortlm.checkpoint import files
from ortlm.checkpoint.patterns import Unbounded, matches
from ortlm.checkpoint.safetensors import FLOATS, Weight, check_finite, read_header, same
from ortlm.dtypes import Array
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What an adapter that cannot be read as it is can still be turned into.
_WAY_OUT = "Merge it with peft, merge_and_unload() and save_pretrained(), and build the merged model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")
# Keys that do not change what a trained adapter computes, or that are looked at below.
_KNOWN = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
        "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
        "target_modules", "task_type", "use_rslora",
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
}
# Other initialisations change the model's own weights before training: they differ from the checkpoint's.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Delta:
    """What a LoRA adds to a weight [out, in]: ``scale · b @ a``, with ``a`` [r, in] and ``b`` [out, r]."""

    a: Weight
    b: Weight
    scale: float

    @property
    def rank(self) -> int:
        """How many directions it has."""
        return self.a.shape[0]

    def down(self) -> Array:
        """Return ``a``: float32 [r, in]."""
        found = self.a.rows(0, self.rank)
        check_finite(found, self.a)
        return found

    def up(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of ``scale · b``: float32 [stop - start, r]."""
        found = self.b.rows(start, stop)
        check_finite(found, self.b)
        return found * np.float32(self.scale)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of what is added: float32 [stop - start, in]."""
        found: Array = self.up(start, stop) @ self.down()
        return found


def read_lora(folder: str | Path, base: Mapping[str, Weight]) -> dict[str, Delta]:
    """Return what the adapter in ``folder`` adds, by the name of the weight in the checkpoint ``base``.

    Raises BadCheckpoint if files are missing, damaged or contradict each other, UnsupportedModel for another
    kind of adapter than a plain LoRA, BadOption for a file that is loaded when a model runs.
    """
    folder = Path(folder)
    _check_folder(folder)
    config = _config(folder)
    file = folder / WEIGHTS_FILE
    found: dict[str, dict[str, Weight]] = {}
    for name, weight in read_header(folder, WEIGHTS_FILE).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            if _is_copy(name, weight, base, file):
                continue
            raise UnsupportedModel(f"{file} holds the tensor {name!r}, {_what_it_is(name)}. {_WAY_OUT}")
        if weight.dtype.name not in FLOATS or len(weight.shape) != 2 or 0 in weight.shape:
            raise BadCheckpoint(
                f"{file}: tensor {name!r} is {weight.dtype.safetensors} of shape {list(weight.shape)}; "
                "expected a matrix of BF16, F16 or F32."
            )
        found.setdefault(match[1], {})[match[2]] = weight
    if not found:
        raise BadCheckpoint(f"{file} holds no tensors, so the adapter does nothing. Save it again.")
    return {f"{module}.weight": _delta(module, pair, config, file) for module, pair in found.items()}


def _is_copy(name: str, weight: Weight, base: Mapping[str, Weight], file: Path) -> bool:
    """Whether it is a copy of a weight of the base model: peft saves the vocabulary's next to a LoRA on it.

    Raises UnsupportedModel if it is another weight than the base model's.
    """
    match = _COPY.fullmatch(name)
    if match is None or f"{match[1]}.weight" not in base:
        return False
    if not same(weight, base[f"{match[1]}.weight"]):
        raise UnsupportedModel(
            f"{file}: {name!r} differs from the base model's {match[1]}.weight, so that the adapter is more than "
            f"a LoRA, or was made for another model. {_WAY_OUT}"
        )
    return True


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
    if config.get("bias", "none") != "none":
        wrong["bias"] = config["bias"]
    if config.get("init_lora_weights") not in _STARTS:
        wrong["init_lora_weights"] = config["init_lora_weights"]
    for key, value in wrong.items():
        text = repr(value)
        raise UnsupportedModel(
            f"{path}: {key} is {text if len(text) < 80 else text[:80] + '…'}, which is not supported: only a "
            f"plain LoRA is. {_WAY_OUT}"
        )
    return check(config, _FIELDS, file=path, error=BadCheckpoint, unknown="keep")


def _delta(module: str, pair: Mapping[str, Weight], config: Mapping[str, Any], file: Path) -> Delta:
    for part in "AB":
        if part not in pair:
            raise BadCheckpoint(
                f"{file}: tensor 'base_model.model.{module}.lora_{part}.weight' is missing. "
                "Save the adapter again."
            )
    a, b = pair["A"], pair["B"]
    rank = _number(config, "rank", module, file)
    if not a.shape[0] == b.shape[1] == rank:
        raise BadCheckpoint(
            f"{file}: {a.name!r} has shape {list(a.shape)} and {b.name!r} {list(b.shape)}, but {CONFIG_FILE} "
            f"gives the rank {rank:g}; expected [{rank:g}, in] and [out, {rank:g}]."
        )
    alpha = _number(config, "alpha", module, file)
    return Delta(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


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
        ("lora_embedding_", "a LoRA on embeddings, which is not supported"),
        ("lora_magnitude_vector", "a part of DoRA, which is not supported"),
        (".bias", "a bias, which a plain LoRA does not change"),
        (".modules_to_save.", "a module that was trained whole, which is not supported"),
    ):
        if part in name:
            return what
    return "which is neither 'base_model.model.MODULE.lora_A.weight' nor '….lora_B.weight'"
