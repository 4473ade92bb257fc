"""The same programs in the official runtime and in ortlm.genai, on one folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
import ortlm.genai

MODULES = ("onnxruntime_genai", "ortlm.genai")


@pytest.fixture(scope="session")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the model that ships with the project, built in float32."""
    out = tmp_path_factory.mktemp("genai") / "model"
    ortlm.build(str(tiny), output=out, precision="fp32", target="cpu")
    return out


@pytest.fixture(scope="session")
def load(folder: Path) -> Callable[..., tuple[Any, Any]]:
    """Return a function from a module's name to the module and the model, loaded once."""
    made: dict[tuple[str, Path], Any] = {}

    def get(name: str, at: Path = folder) -> tuple[Any, Any]:
        og = pytest.importorskip(name)
        og.disable_telemetry_events()
        if (name, at) not in made:
            config = og.Config(str(at))
            threads = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}
            config.overlay(json.dumps(threads))
            made[name, at] = og.Model(config)
        return importlib.import_module(name), made[name, at]

    return get


@pytest.fixture(scope="session")
def both(load: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Return a function that runs a program in both modules and returns what both return, if that is equal."""

    def run(program: Callable[[Any, Any], Any], **options: Any) -> Any:
        theirs, ours = (plain(program(*load(name, **options))) for name in MODULES)
        assert ours == theirs
        return ours

    return run


@pytest.fixture(scope="session")
def model(load: Callable[..., tuple[Any, Any]]) -> ortlm.genai.Model:
    """Return the model in ortlm.genai."""
    found: ortlm.genai.Model = load("ortlm.genai")[1]
    return found


def generator(og: Any, model: Any, **options: Any) -> Any:
    """Return a Generator with these search options."""
    params = og.GeneratorParams(model)
    params.set_search_options(**options)
    return og.Generator(model, params)


def finish(made: Any) -> list[list[int]]:
    """Generate to the end and return the tokens of each step."""
    steps = []
    while not made.is_done():
        made.generate_next_token()
        steps.append(made.get_next_tokens().tolist())
    return steps


def plain(value: Any) -> Any:
    """Return numpy's arrays and numbers as Python's."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
