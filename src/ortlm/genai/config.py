"""What a program may change about a model before it loads it."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import parse
from ortlm.artifact import (
    GENAI_FILE,
    Artifact,
    GenaiFacts,
    genai_artifact,
    genai_facts,
    inside,
    overlay_genai,
    portable,
    read_genai,
    with_genai_providers,
)
from ortlm.errors import BadOption, nearest
from ortlm.genai.errors import GenaiError, official, text


class Config:
    """The ``genai_config.json`` of the folder ``path``, and changes to it that never reach the disk.

    Raises GenaiError if there is no such file or it is damaged.
    """

    @official
    def __init__(self, path: str | Path) -> None:
        self._folder = Path(path)
        self._found = read_genai(self._folder)
        self._data: dict[str, bytes] = {}
        self._published = self._facts()
        # Search options that the program set, which are not to be changed.
        self._asked: set[str] = set()

    @official
    def clear_providers(self) -> None:
        """Name no execution provider any more, so that the CPU is used."""
        self._set_providers({})

    @official
    def append_provider(self, provider: str) -> None:
        """Name one more execution provider, as "cuda" or "CUDAExecutionProvider"."""
        self._set_option(provider, {})

    @official
    def set_provider_option(self, provider: str, key: str, value: str) -> None:
        """Set an option of a provider, which is named if it was not."""
        self._set_option(provider, {text(key, "an option's name"): text(value, "an option's value")})

    @official
    def overlay(self, changes: str) -> None:
        """Change the configuration by JSON of the same form: values replace, items of lists are added.

        Raises GenaiError for keys that are not known and for values of another kind; nothing has changed then.
        """
        found = parse(text(changes, "an overlay"), where="the overlay", error=BadOption)
        changed = overlay_genai(self._found, found)
        genai_facts(changed, self._folder / GENAI_FILE)
        self._found = changed
        self._asked |= (found.get("search") or {}).keys()

    @official
    def add_model_data(self, filename: str, data: Any) -> None:
        """Let these bytes stand in for the file ``filename`` of the folder, whether it exists or not."""
        if Path(text(filename, "a file's name")).name != filename:
            raise GenaiError(f"{filename!r} must be the name of a file, without folders.")
        try:
            view = memoryview(data)
        except TypeError:
            raise GenaiError(f"the data of a file must be bytes, found {type(data).__name__}.") from None
        if view.ndim != 1 or view.itemsize != 1:
            raise GenaiError(
                "the data of a file must be bytes, or numbers of the kind uint8 in one dimension."
            )
        self._data[filename] = view.tobytes()

    @official
    def remove_model_data(self, filename: str) -> None:
        """Forget what ``add_model_data`` was given. Raises GenaiError if that was nothing."""
        if filename not in self._data:
            raise GenaiError(f"no data was given for {filename!r}." + nearest(filename, self._data))
        del self._data[filename]

    @staticmethod
    def from_package_ep(config_path: str, ep: str) -> Config:
        """Packages of several variants are not supported: raises GenaiError."""
        raise GenaiError(
            f"packages with a variant for each execution provider are not supported. Give the folder of the "
            f"variant for {ep or 'yours'} within {config_path} to Config."
        )

    def set_decoder_provider_options_hardware_device_type(self, provider: str, device_type: str) -> None:
        """Devices cannot be picked: raises GenaiError."""
        raise _no_devices(provider)

    def set_decoder_provider_options_hardware_device_id(self, provider: str, device_id: int) -> None:
        """Devices cannot be picked: raises GenaiError."""
        raise _no_devices(provider)

    def set_decoder_provider_options_hardware_vendor_id(self, provider: str, vendor_id: int) -> None:
        """Devices cannot be picked: raises GenaiError."""
        raise _no_devices(provider)

    def clear_decoder_provider_options_hardware_device_type(self, provider: str) -> None:
        """Nothing was set, so there is nothing to do."""

    def clear_decoder_provider_options_hardware_device_id(self, provider: str) -> None:
        """Nothing was set, so there is nothing to do."""

    def clear_decoder_provider_options_hardware_vendor_id(self, provider: str) -> None:
        """Nothing was set, so there is nothing to do."""

    # --- for the rest of this package -------------------------------------------------------------------

    def _facts(self) -> GenaiFacts:
        return genai_facts(self._found, self._folder / GENAI_FILE)

    def _set_option(self, provider: str, options: dict[str, str]) -> None:
        providers = {name: dict(values) for name, values in self._facts().providers}
        name = _short(text(provider, "an execution provider"))
        same = next((known for known in providers if _short(known) == name), provider)
        providers.setdefault(same, {}).update(options)
        self._set_providers(providers)

    def _set_providers(self, providers: dict[str, dict[str, str]]) -> None:
        self._found = with_genai_providers(self._found, providers)

    def _artifact(self) -> tuple[Artifact, _Copy | None]:
        """Return the artifact, and the temporary folder that it lies in if data was given."""
        if not self._data:
            return genai_artifact(self._folder, self._found), None
        # Weights lie beside their graph by name, so a graph from memory needs a folder where they are found.
        copy = _Copy()
        for path in self._folder.iterdir():
            if path.is_file() and path.name not in self._data:
                _place((self._folder / inside(path.name, path)).resolve(), copy.path / path.name)
        for name, data in self._data.items():
            (copy.path / name).write_bytes(data)
        made = genai_artifact(copy.path, self._found)
        # What was given is what runs, and not another graph that can do more than the one it stands in for.
        return replace(made, manifest=portable(made.manifest)), copy


class _Copy:
    """A folder that lasts as long as this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ortlm-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system. ONNX Runtime refuses weights behind a symbolic link that leads elsewhere.
        shutil.copyfile(source, target)


def _short(provider: str) -> str:
    return provider.lower().removesuffix("executionprovider")


def _no_devices(provider: str) -> GenaiError:
    return GenaiError(
        f"devices of {provider} cannot be picked by type or id; ONNX Runtime's default device is used."
    )
