"""The chat templates of a folder: which files they are in, and which of them count."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import read_object, read_text, shown
from ortlm.errors import BadArtifact, Error

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
# Files of the versions before, the second of processors.
_SETTINGS = ("tokenizer_config.json", "chat_template.json")
# What `plain_tokenizer_config` of the build makes of a list; see there.
NAMED_TEMPLATES = "named_chat_templates"
# The longest in use has 40 kB.
MOST_TEMPLATE_BYTES = 512 << 10
_MOST_SETTINGS_BYTES = 16 << 20
_MOST_TEMPLATES = 100


def read_templates(folder: Path, error: type[Error] = BadArtifact) -> dict[str, str]:
    """Return the chat templates in ``folder`` by name, empty if there are none.

    As in transformers, templates in files of their own replace all that stand in a configuration. One without a
    name is called "default". Raises ``error`` for what is no template.
    """
    found: dict[str, str] = {}
    path = folder / TEMPLATE_FILE
    if os.path.lexists(path):
        found["default"] = read_text(path, limit=MOST_TEMPLATE_BYTES, error=error)
    for path in _template_files(folder, error):
        found[path.name.removesuffix(".jinja")] = read_text(path, limit=MOST_TEMPLATE_BYTES, error=error)
    if "default" in found:
        return found
    for source in _SETTINGS:
        path = folder / source
        if not os.path.lexists(path):
            continue
        settings = read_object(path, limit=_MOST_SETTINGS_BYTES, error=error)
        for key in (NAMED_TEMPLATES, "chat_template"):
            named = named_templates(settings.get(key), f'{path}: "{key}"', error)
            if named:
                return {**named, **found}
    return found


def _template_files(folder: Path, error: type[Error] = BadArtifact) -> list[Path]:
    """Return the files of ``folder`` that hold templates with names."""
    place = folder / TEMPLATE_FOLDER
    if not place.is_dir():
        return []
    found = sorted(p for p in place.glob("*.jinja") if p.name.isprintable())
    if len(found) > _MOST_TEMPLATES:
        raise error(
            f"{place} has {len(found)} chat templates; at most {_MOST_TEMPLATES} are read. Remove some."
        )
    return found


def named_templates(value: Any, where: str, error: type[Error]) -> dict[str, str]:
    """Return the templates that a configuration's ``value`` holds by name, empty for null.

    A value is a template, a list of {"name": ..., "template": ...}, or an object of templates by name.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        value = {"default": value}
    elif isinstance(value, list):
        pairs: dict[str, Any] = {}
        for item in value[: _MOST_TEMPLATES + 1]:
            if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
                raise error(
                    f'{where} holds {shown(item)}, expected objects with "name" and "template", both texts.'
                )
            pairs[item["name"]] = item.get("template")
        value = pairs
    if not isinstance(value, Mapping) or len(value) > _MOST_TEMPLATES:
        raise error(
            f"{where} is {shown(value)}, expected a template, or a list of at most {_MOST_TEMPLATES} objects with "
            '"name" and "template".'
        )
    for name, template in value.items():
        if not isinstance(template, str):
            raise error(f"{where} has {shown(template)} as the template {shown(name)}, expected a text.")
        if len(template) > MOST_TEMPLATE_BYTES:
            raise error(
                f"{where} has a template {shown(name)} of {len(template):,} characters; at most "
                f"{MOST_TEMPLATE_BYTES:,} are read."
            )
    return dict(value)
