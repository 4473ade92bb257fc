"""The lock: one exact version of all that is installed, on every Python version that ortlm runs on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# Extras that are not in the lock: packages of devices replace each other, and Ray is locked apart.
DEVICES = {"cuda", "openvino", "webgpu", "ray"}
LOCKS = ["lock", "lowest", "lowest-oracle", "ray"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def text(lock: str) -> str:
    return (ROOT / f"requirements/{lock}.txt").read_text(encoding="utf-8")


def environment(python: str) -> dict[str, str]:
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.1"}


def locked(python: str, lock: str = "lock") -> dict[str, str]:
    """Return the version of every package that a lock names for a Python version on this kind of machine."""
    found: dict[str, str] = {}
    for line in text(lock).splitlines():
        if line.startswith("#"):
            continue
        wanted = Requirement(line)
        (version,) = wanted.specifier
        assert version.operator == "=="
        if wanted.marker is None or wanted.marker.evaluate(environment(python)):
            assert wanted.name not in found, f"{wanted.name} is locked twice for Python {python}"
            found[wanted.name] = version.version
    return found


def declared() -> list[Requirement]:
    """Return all that pyproject.toml and requirements/tools.in ask for."""
    project = PROJECT["project"]
    tools = (ROOT / "requirements/tools.in").read_text(encoding="utf-8").splitlines()
    texts = [
        *project["dependencies"],
        *(
            text
            for name, extra in project["optional-dependencies"].items()
            if name not in DEVICES
            for text in extra
        ),
        *PROJECT["build-system"]["requires"],
        *(line for line in tools if not line.startswith("#")),
    ]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("python", VERSIONS)
def test_all_that_is_asked_for_is_locked_within_its_range(python: str) -> None:
    versions = locked(python)
    for wanted in declared():
        if wanted.marker is None or wanted.marker.evaluate(environment(python)):
            name = canonicalize_name(wanted.name)
            assert name in versions, f"{wanted} is not in the lock: run make update-lock UPGRADE="
            assert wanted.specifier.contains(versions[name]), f"{wanted}, but {versions[name]} is locked"


@pytest.mark.parametrize("lock", [*LOCKS, "clients"])
def test_no_addresses_no_hashes_no_packages_of_one_kind_of_machine(lock: str) -> None:
    pins = text(lock)
    assert not re.search(r"://|--|\bfile:|@|sha256", pins)
    assert not re.search(r"^(nvidia-|cuda-|triton\b)", pins, re.MULTILINE)
    assert "+" not in pins, "a local build such as +cpu exists on some machines only"


@pytest.mark.parametrize("python", VERSIONS)
def test_all_clients_are_locked(python: str) -> None:
    lines = (ROOT / "requirements/clients.in").read_text(encoding="utf-8").splitlines()
    versions = locked(python, "clients")
    assert {line for line in lines if not line.startswith("#")} <= versions.keys()
    assert "openai" in versions


def test_the_lock_of_node_names_versions_and_no_addresses() -> None:
    folder = ROOT / "tests/clients/node"
    lock = json.loads((folder / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    wanted = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    for name, version in wanted.items():
        assert lock[f"node_modules/{name}"]["version"] == version
    assert not any("resolved" in package for package in lock.values())


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
@pytest.mark.parametrize("lock", LOCKS[1:3])
def test_the_lowest_versions_are_those_of_the_ranges(lock: str, python: str) -> None:
    """The oracle raises some of them, by what it asks for itself."""
    versions = locked(python, lock)
    above = set()
    for wanted in map(Requirement, PROJECT["project"]["dependencies"]):
        if wanted.marker is not None and not wanted.marker.evaluate(environment(python)):
            continue
        (lowest,) = (Version(item.version) for item in wanted.specifier if item.operator == ">=")
        assert any(item.operator == "<" for item in wanted.specifier) or wanted.name in {"pillow", "rich"}
        if Version(versions[canonicalize_name(wanted.name)]) != lowest:
            above.add(wanted.name)
    raised = {"huggingface_hub", "ml_dtypes", "rich", "safetensors", "tokenizers"}
    assert above == (raised if lock == "lowest-oracle" else set())


def test_the_readme_names_the_version_of_transformers_that_is_compared_with() -> None:
    named = re.findall(r"transformers (\d+\.\d+\.\d+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(named) == {locked("3.11")["transformers"]}
