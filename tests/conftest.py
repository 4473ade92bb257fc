"""Shared fixtures, and how the tests run where their oracle is not installed."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact
from ortlm.quant import recipe_file as recipe_file

# What the tests compare with. No user needs it, and it does not go with the lowest versions of what users need.
ORACLE = {"torch", "transformers", "peft", "lm_eval", "onnxruntime_genai"}

# The same examples every day; make fuzz looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")

# Most tests are about other things than calibration, which would take most of their time.
recipe_file.DEFAULTS["int4"] = "fast"

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for other versions than the locked ones, and for another environment."""
    parser.addoption(
        "--unlocked",
        action="store_true",
        help="skip tests that need what is not installed; of other packages' warnings none is an error",
    )
    parser.addoption(
        "--as-device",
        action="store_true",
        help="load models on a device that copies what is bound and hides its memory",
    )
    parser.addoption("--python", help="the interpreter that runs examples/, by default that of the tests")


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch to one thread, and other packages' news from failing tests."""
    if config.getoption("--as-device"):
        from ortlm.runtime import loading
        from tests.runtime.device_like import DeviceLikeSession

        loading.Session = DeviceLikeSession  # type: ignore[misc]
    if config.getoption("--unlocked"):
        config.addinivalue_line("filterwarnings", "default")
        config.addinivalue_line("filterwarnings", r"error:::ortlm(\.|$)")
    try:
        import torch
    except ModuleNotFoundError:
        if not config.getoption("--unlocked"):
            raise
    else:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what shares something that is made once, which is always a model, and fuzzing."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
        shares = any(found[-1].baseid and found[-1].scope in {"session", "module"} for found in fixtures)
        if shares or item.path.parent.name == "fuzz":
            item.add_marker("slow")


def _is_lacking(config: pytest.Config, error: BaseException | None) -> bool:
    """Whether ``error`` says that the oracle, or a newer ONNX Runtime, is not here, and need not be."""
    while error is not None and config.getoption("--unlocked"):
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in ORACLE:
            return True
        if isinstance(error, BadArtifact) and re.search(
            r" needs ONNX Runtime \S+ or later, found ", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Skip modules that import an oracle that is not installed."""
    report = yield
    excinfo = report.call.excinfo
    if excinfo is not None and _is_lacking(collector.config, excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs what is not installed")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Skip tests that need an oracle or a newer ONNX Runtime than is installed."""
    report = yield
    if call.excinfo is not None and _is_lacking(item.config, call.excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: needs what is not installed")
    return report


class Saved:
    """A tiny checkpoint on disk and the transformers model that it was saved from."""

    def __init__(self, name: str, folder: Path) -> None:
        from tests.architectures import families

        self.name = name
        self.folder = folder
        self.model: Any = families.save(name, folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a function from a family row to its checkpoint; each is made once."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            made[name] = Saved(name, tmp_path_factory.mktemp("checkpoint") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def build(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ortlm.LanguageModel]:
    """Return a function that builds a family row once per precision and options, and loads it."""
    made: dict[tuple[Any, ...], ortlm.LanguageModel] = {}

    def get(name: str, precision: str = "fp32", options: BuildOptions | None = None) -> ortlm.LanguageModel:
        key = (name, precision, options)
        if key not in made:
            out = tmp_path_factory.mktemp("built") / f"{name}-{precision}"
            ortlm.build(saved(name).folder, out, precision=precision, options=options)
            made[key] = ortlm.load(out, threads=1)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Return the folder of the small trained model that ships with the project."""
    return ROOT / "models" / "tiny-phi3"
