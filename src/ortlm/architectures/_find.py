"""Which family file describes a checkpoint."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from ortlm import errors
from ortlm.architectures._gguf import Gguf
from ortlm.architectures._keys import Keys, check_read, quoted, shown
from ortlm.architectures._refused import REFUSED
from ortlm.errors import BadCheckpoint, UnsupportedModel
from ortlm.spec import Architecture

# Multimodal models are named by the third; the last is what a causal model is without its head.
_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")
# Two tables of so many positions take 0.5 GB for heads of 128 channels, whenever a model is loaded.
_MOST_TOKENS = 2**20
Describe = Callable[[Mapping[str, Any]], Architecture]


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of the checkpoint with this ``config.json``.

    Raises what ``find`` raises, BadCheckpoint for values that cannot be, and UnsupportedModel for a key that may
    change what the model computes and that its family does not know.
    """
    family, keys = find(config), Keys(config)
    architecture = family(keys)
    windowed = {mixer.window is not None for mixer in architecture.decoder.attentions}
    unknown = check_read(keys, windows=windowed.pop() if len(windowed) == 1 else None)
    architecture = replace(architecture, notes=(*architecture.notes, *_told(unknown)))
    tokens = architecture.decoder.max_tokens
    if tokens <= _MOST_TOKENS:
        return architecture
    note = (
        f'config.json: "max_position_embeddings" is {tokens:,}; the context ends at {_MOST_TOKENS:,}, because '
        "rotation tables for more positions would take gigabytes."
    )
    decoder = replace(architecture.decoder, max_tokens=_MOST_TOKENS)
    return replace(architecture, decoder=decoder, notes=(*architecture.notes, note))


def _told(unknown: Sequence[str]) -> list[str]:
    if not unknown:
        return []
    shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if unknown[8:] else "")
    return [f"config.json: keys that ortlm does not know, and passes over as bookkeeping: {shown}."]


def find(config: Mapping[str, Any]) -> Describe:
    """Return the ``describe`` function of the family that ``config`` names.

    Raises ``BadCheckpoint`` if there is no model type, ``UnsupportedModel`` if the type is not known, if the
    checkpoint is not a causal language model or if its weights are quantized already.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or not name:
        found = None if name is None else shown(name)
        raise BadCheckpoint(f'config.json: "model_type" is {found}, expected one of: {_list(_table())}.')
    if name in REFUSED:
        raise UnsupportedModel(
            f'config.json: "model_type" is {quoted(name)}, which cannot be built: {REFUSED[name]}'
        )
    if name not in _table():
        raise UnsupportedModel(
            f'config.json: "model_type" is {quoted(name)}, which is not supported.{errors.nearest(name, _table())}'
            f" Known types: {_list(_table())}."
        )
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        named = quoted(str(method))[1:-1] if method else "unnamed method"
        raise UnsupportedModel(
            f'config.json: "quantization_config" ({named}) says that the weights are quantized already. That is '
            "read where it is a key of the file itself. Use the original checkpoint in bf16, fp16 or fp32."
        )
    kinds = config.get("architectures")
    kinds = kinds if isinstance(kinds, list) else []
    if kinds and not any(str(kind).endswith(_ENDINGS) for kind in kinds):
        raise UnsupportedModel(
            f'config.json: "architectures" is {shown(kinds)}; only causal language models can be built, '
            f"whose name ends in {' or '.join(_ENDINGS)}."
        )
    return _table()[name]


def model_types() -> list[str]:
    """Return every known ``model_type``, sorted."""
    return sorted(_table())


def find_gguf(name: str, where: str, *, mixture: bool) -> Gguf:
    """Return how GGUF files hold models whose ``general.architecture`` is ``name``, with or without experts.

    Raises UnsupportedModel if it is not known; ``where`` is the file.
    """
    forms = gguf_forms()
    known = {form.name: form for form in forms} | {
        form.name: form for form in forms if form.mixture == mixture
    }
    if name not in known:
        usable = [form.name for form in forms if not form.refused]
        raise UnsupportedModel(
            f'{where}: "general.architecture" is {quoted(name)}, which is not supported.'
            f"{errors.nearest(name, usable)} Known: {_list(set(usable))}."
        )
    if known[name].refused:
        raise UnsupportedModel(f'{where}: "general.architecture" is {quoted(name)}. {known[name].refused}')
    return known[name]


@functools.cache
def gguf_forms() -> tuple[Gguf, ...]:
    """Return how GGUF files hold each family that there are such files of."""
    found: list[Gguf] = []
    for module in _modules():
        forms = getattr(module, "GGUF", ())
        found += (forms,) if isinstance(forms, Gguf) else forms
    return tuple(found)


@functools.cache
def _table() -> dict[str, Describe]:
    return table(_modules())


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    package = importlib.import_module("ortlm.architectures")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return tuple(importlib.import_module(f"{package.__name__}.{name}") for name in names)


def table(modules: Iterable[ModuleType]) -> dict[str, Describe]:
    """Map each model type to its module's ``describe``; ``ValueError`` if two modules name the same type."""
    result: dict[str, Describe] = {}
    owners: dict[str, str] = {}
    for module in modules:
        for name in module.MODEL_TYPES:
            if name in result:
                raise ValueError(f'model type "{name}" is named by both {owners[name]} and {module.__name__}')
            result[name], owners[name] = module.describe, module.__name__
    return result


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
