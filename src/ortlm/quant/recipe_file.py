"""Recipes by name, and from files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import read_text, shown
from ortlm._utils.formatting import printable
from ortlm.errors import BadOption, nearest
from ortlm.quant.algorithms import check_algorithm
from ortlm.quant.recipe import PRESETS, ROLES, SENSITIVE, Preset, Rule
from ortlm.quant.scheme import Scheme

# What a precision means if nothing else is asked for; 8 bits lose little in rounding.
DEFAULTS = {"int4": "balanced", "int8": "fast"}

_MOST_BYTES, _MOST_DEPTH = 1 << 18, 20
# Keys of a recipe file, and the types of what they hold.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "base": str, "algorithm": str, "bits": int, "block": int, "symmetric": bool, "head_bits": int,
    "embed_bits": int, "vision_bits": int, "wide": bool, "rotate": bool, "rules": list, "calibration": Mapping,
}  # fmt: skip
_RULE_KEYS: dict[str, type | tuple[type, ...]] = {
    "roles": (list, str), "layers": (list, str), "nodes": (list, str), "at_most": int, "at_most_inputs": int,
    "bits": int, "block": int, "symmetric": bool, "algorithm": str,
}  # fmt: skip
_CALIBRATION_KEYS: dict[str, type | tuple[type, ...]] = {
    "tokens": int, "length": int, "damping": (int, float), "sweeps": int, "correct": bool, "seed": int,
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """Return the recipe called ``name``, or the one in the YAML or JSON file ``name``.

    Raises BadOption if there is neither, or for what the file says and must not.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise BadOption(
            f"there is no recipe {name!r}, and no such file; there are {', '.join(PRESETS)}."
            + nearest(name, PRESETS)
        )
    return _read(path)


def _read(path: Path) -> Preset:
    import yaml

    content = read_text(path, limit=_MOST_BYTES, error=BadOption)
    try:
        depth = 0
        # Looked at before anything is made of it: aliases multiply, and what is made of nested things recurses.
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MOST_DEPTH:
                what = "an alias" if isinstance(event, yaml.AliasEvent) else f"more than {_MOST_DEPTH} levels"
                raise BadOption(f"the recipe {path} has {what}, which no recipe needs. Write it out.")
        parsed = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        if isinstance(error, BadOption):
            raise
        reason = " ".join(printable(str(error)).split()) or type(error).__name__
        raise BadOption(f"the recipe {path} cannot be read as YAML: {reason}") from error
    keys = _checked(parsed, _KEYS, str(path))
    base = keys.pop("base", "balanced")
    if base not in PRESETS:
        raise BadOption(f"{path}: base is {base!r}; there are {', '.join(PRESETS)}." + nearest(base, PRESETS))
    preset = PRESETS[base]
    rules = tuple(_rule(rule, f"{path}: rules[{i}]") for i, rule in enumerate(keys.pop("rules", ())))
    if "calibration" in keys:
        changes = _checked(keys.pop("calibration"), _CALIBRATION_KEYS, f"{path}: calibration")
        preset = dataclasses.replace(preset, calibration=dataclasses.replace(preset.calibration, **changes))
    preset = dataclasses.replace(preset, name=path.stem, rules=(*preset.rules, *rules), **keys)
    check_algorithm(preset.algorithm)
    # Scheme and Calibration know what is allowed.
    for bits in (
        preset.bits,
        preset.head_bits,
        preset.embed_bits,
        preset.vision_bits,
        *(rule.bits for rule in rules),
    ):
        Scheme(bits=bits or 4, block=preset.block or 128)
    return preset


def _rule(entry: object, where: str) -> Rule:
    given = _checked(entry, _RULE_KEYS, where)
    for key in ("roles", "nodes"):
        if key in given:
            listed = given[key] if isinstance(given[key], list) else [given[key]]
            given[key] = tuple(str(item) for item in listed)
    for role in given.get("roles", ()):
        if role not in ROLES:
            raise BadOption(
                f"{where}: there is no role {role!r}; there are {', '.join(ROLES)}." + nearest(role, ROLES)
            )
    layers = given.get("layers")
    if isinstance(layers, list):
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise BadOption(f"{where}: layers must be numbers or {SENSITIVE!r}; got {layers!r}.")
        given["layers"] = tuple(layers)
    elif layers not in (None, SENSITIVE):
        raise BadOption(f"{where}: layers must be a list of numbers or {SENSITIVE!r}; got {layers!r}.")
    if "algorithm" in given:
        check_algorithm(given["algorithm"])
    Scheme(bits=given.get("bits") or 4, block=given.get("block", 128))
    if not {"bits", "block", "symmetric", "algorithm"} & set(given):
        raise BadOption(f"{where} changes nothing: give bits, block, symmetric or algorithm.")
    return Rule(**given)


def _checked(given: object, keys: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    """Return the mapping ``given`` if it holds ``keys`` only, each of its type."""
    if not isinstance(given, Mapping):
        raise BadOption(f"{where} must hold keys and values; there are {', '.join(keys)}.")
    for key, value in given.items():
        if key not in keys:
            raise BadOption(
                f"{where}: there is no key {shown(key)}; there are {', '.join(keys)}."
                + nearest(str(key), keys)
            )
        kind = keys[key]
        # True counts as a number in Python, and must not here.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadOption(f"{where}: {key} is {shown(value)}, which cannot be used.")
    return dict(given)
