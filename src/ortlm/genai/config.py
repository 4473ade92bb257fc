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
from ortlm.genai.errors import GenaiError, official, text, whole
from ortlm.genai.providers import get_current_gpu_device_id
from ortlm.runtime.engine.device_kinds import DEVICE_TYPES, short_name
from ortlm.runtime.engine.devices import DeviceRequest


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
        # What devices have to be, by provider.
        self._filters: dict[str, dict[str, str | int]] = {}
        # Search options that the program set, which are not to be changed.
        self._asked: set[str] = set()

    @official
    def clear_providers(self) -> None:
        """Name no execution provider any more, so that the CPU is used."""
        self._set_providers({})
        self._filters = {}

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
        given = parse(text(changes, "an overlay"), where="the overlay", error=BadOption)
        changed = overlay_genai(self._found, given)
        genai_facts(changed, self._folder / GENAI_FILE)
        self._found = changed
        self._asked |= (given.get("search") or {}).keys()

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

    @official
    def set_decoder_provider_options_hardware_device_type(self, provider: str, device_type: str) -> None:
        """Use a device of the type "CPU", "GPU" or "NPU", of those that a plugin lists, and name the provider."""
        kind = text(device_type, "a type of device").lower()
        if kind not in DEVICE_TYPES:
            raise GenaiError(f"there is no type of device {device_type!r}; there are CPU, GPU and NPU.")
        self._filter(provider, "hardware_device_type", kind)

    @official
    def set_decoder_provider_options_hardware_device_id(self, provider: str, device_id: int) -> None:
        """Use the device with this hardware id, of those that a plugin lists, and name the provider."""
        self._filter(provider, "hardware_device_id", whole(device_id, "a device's id"))

    @official
    def set_decoder_provider_options_hardware_vendor_id(self, provider: str, vendor_id: int) -> None:
        """Use a device of the vendor with this id, of those that a plugin lists, and name the provider."""
        self._filter(provider, "hardware_vendor_id", whole(vendor_id, "a vendor's id"))

    @official
    def clear_decoder_provider_options_hardware_device_type(self, provider: str) -> None:
        """Use a device of any type again."""
        self._filter(provider, "hardware_device_type", None)

    @official
    def clear_decoder_provider_options_hardware_device_id(self, provider: str) -> None:
        """Use a device with any id again."""
        self._filter(provider, "hardware_device_id", None)

    @official
    def clear_decoder_provider_options_hardware_vendor_id(self, provider: str) -> None:
        """Use a device of any vendor again."""
        self._filter(provider, "hardware_vendor_id", None)

    # --- for the rest of this package -------------------------------------------------------------------

    def _facts(self) -> GenaiFacts:
        return genai_facts(self._found, self._folder / GENAI_FILE)

    def _set_option(self, provider: str, options: dict[str, str]) -> None:
        providers = {name: dict(values) for name, values in self._facts().providers}
        name = short_name(text(provider, "an execution provider"))
        same = next((known for known in providers if short_name(known) == name), provider)
        providers.setdefault(same, {}).update(options)
        self._set_providers(providers)

    def _filter(self, provider: str, key: str, value: str | int | None) -> None:
        """Set or, with None, clear what a device of a provider has to be."""
        wanted = self._filters.setdefault(short_name(text(provider, "an execution provider")), {})
        if value is None:
            wanted.pop(key, None)
        else:
            wanted[key] = value
            self._set_option(provider, {})

    def _device(self) -> DeviceRequest:
        """Return the one device that the model is to run on, and what the program set for it.

        Without a call of the program, that is the one which the folder names. Raises BadOption for several.
        """
        asked, published = self._facts().providers, self._published.providers
        default = asked == published
        if len(asked) > 1 and not default:
            raise BadOption(
                f"a model runs on one device, found {', '.join(name for name, _ in asked)}. Call "
                "clear_providers() before you name another one."
            )
        name, options = asked[0] if asked else ("cpu", {})
        short = short_name(name)
        known = {short_name(other): values for other, values in published}.get(short, {})
        changed = {key: value for key, value in options.items() if known.get(key) != value}
        if short == "cuda" and "device_id" not in options and get_current_gpu_device_id():
            return DeviceRequest(f"cuda:{get_current_gpu_device_id()}", changed)
        return DeviceRequest(None if default else name, changed, self._filters.get(short, {}))

    def _set_providers(self, providers: dict[str, dict[str, str]]) -> None:
        self._found = with_genai_providers(self._found, providers)

    def _as_built(self, artifact: Artifact) -> Artifact:
        """Return ``artifact`` for the device that the folder names, whatever the program asks for."""
        name, options = next(iter(self._published.providers), ("cpu", {}))
        manifest = replace(artifact.manifest, device=name, device_options=dict(options))
        return replace(artifact, manifest=manifest)

    def _artifact(self) -> tuple[Artifact, TemporaryFolder | None]:
        """Return the artifact, and the temporary folder that it lies in if data was given."""
        if not self._data:
            return self._as_built(genai_artifact(self._folder, self._found)), None
        # Weights lie next to their graph by name, so a graph from memory needs a folder where they are found.
        copy = TemporaryFolder()
        for path in self._folder.iterdir():
            if path.is_file() and path.name not in self._data:
                _place((self._folder / inside(path.name, path)).resolve(), copy.path / path.name)
        for name, data in self._data.items():
            (copy.path / name).write_bytes(data)
        made = self._as_built(genai_artifact(copy.path, self._found))
        # What was given is what runs, and not another graph that can do more than the one it stands in for.
        return replace(made, manifest=portable(made.manifest)), copy


class TemporaryFolder:
    """A folder that lasts as long as this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ortlm-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system. ONNX Runtime refuses weights reached through a symbolic link that leads elsewhere.
        shutil.copyfile(source, target)
