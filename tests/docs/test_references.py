"""What the pages point at exists: files, headings, modules and flags."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.builder.extra_options import parse_extra_options
from ortlm.cli import COMMANDS
from ortlm.evaluation.evaluate import evaluate
from ortlm.runtime.text.chat_template import ChatTemplate
from ortlm.target import find_target
from tests.docs.pages import ROOT, Page, pages

SOURCE = Path(ortlm.__file__).parent
PAGES = pages("CONTRIBUTING.md", "SECURITY.md", "AGENTS.md", "benchmarks/README.md", "examples/README.md")
# Flags of other programs that the pages name, and of scripts.
OTHERS = {
    "--model": "lm_eval",
    "--fix": "ruff",
    "--force-reinstall": "pip",
    "--no-deps": "pip",
    "--apply_chat_template": "lm_eval",
    "--batch_size": "lm_eval",
    "--model_args": "lm_eval",
    "--tasks": "lm_eval",
    "--kl-divergence": "llama-perplexity",
    "--unlocked": "pytest, see tests/conftest.py",
    "--upgrade-package": "uv",
    "--head": "ray start",
    "--address": "ray start",
}
OTHER_KEYWORDS = {
    "ORTLM_EVERY_KEY": "an environment variable of the tests",
    "BROWSER": "a variable of the Makefile",
    "CLIENTS": "a variable of the Makefile",
    "SOAK_MINUTES": "a variable of the Makefile",
    "check_embedding_ctx_length": "an argument of LangChain",
    "add_special_tokens": "ortlm.genai",
    "enable_thinking": "a variable of chat templates",
    "windowed_kv_cache": "an extra option",
    "prune_lm_head": "an extra option",
}
SCRIPTS = ("benchmarks/README.md",)
BUILT = {"dist/", "onnx/"}  # folders that git ignores, and those of artifacts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Page) -> None:
    for link in page.links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page.name).parent / path if path else ROOT / page.name
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor and target.suffix == ".md":
            name = target.resolve().relative_to(ROOT).as_posix()
            assert anchor in Page(name).anchors, f"{page.name}: {name} has no heading #{anchor}"


def flags() -> set[str]:
    """Return the long options of every command."""
    found = {"--help", "--version"}
    for module, _ in COMMANDS.values():
        subparsers = argparse.ArgumentParser().add_subparsers()
        importlib.import_module(module).add_parser(subparsers)
        for parser in subparsers.choices.values():
            found.update(name for name in parser._option_string_actions if name.startswith("--"))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in SCRIPTS], ids=lambda page: page.name)
def test_flags(page: Page) -> None:
    known = flags() | set(OTHERS)
    for code in page.inline:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert flag in known, f"{page.name} names {flag}, which no command has"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_modules(page: Page) -> None:
    """`folder/file.py`, relative to the repository, the package or a part of it, and `ortlm.module.name`."""
    here = (ROOT / page.name).parent
    places = [
        here,
        ROOT,
        ROOT / "tests",
        SOURCE,
        SOURCE.parent,
        *(path for path in SOURCE.iterdir() if path.is_dir()),
    ]
    for code in page.inline:
        if code in BUILT:
            continue
        if re.fullmatch(r"[\w./-]+\.py(::\w+)?", code) or re.fullmatch(r"\w[\w.]*/(\w+/)*", code):
            path = code.partition("::")[0]
            known = any((place / path).exists() for place in places)
            known = known or ("/" not in path and any(SOURCE.rglob(path)))
            assert known, f"{page.name} names {code}, which is not there"
        for dotted in re.findall(r"(?<![\w./-])(?:ortlm|tests)(?:\.\w+)+(?![\w/-])", code):
            if dotted not in {"ortlm.json"}:
                assert _is_there(dotted), f"{page.name} names {dotted}, which is not there"


def keywords() -> set[str]:
    """Return the keyword arguments of what users call."""
    calls: list[Callable[..., Any]] = [ortlm.load, ortlm.build, evaluate, ChatTemplate, ChatTemplate.render]
    for kind in (ortlm.LanguageModel, ortlm.Generator):
        calls += [call for name, call in inspect.getmembers(kind, callable) if not name.startswith("_")]
    found = {field.name for kind in (ortlm.Settings, ortlm.BuildOptions) for field in fields(kind)}
    return found.union(*(inspect.signature(call).parameters for call in calls))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_arguments_and_attributes(page: Page) -> None:
    """`name=value`, `lm.name` and `--extra_options KEY=VALUE`."""
    known = keywords() | set(OTHER_KEYWORDS)
    for code in page.inline:
        if found := re.match(r"(\w+)=(?!=)", code):
            assert found[1] in known, f"{page.name} names the argument {code}, which nothing has"
        for name in re.findall(r"\blm\.(\w+)", code):
            assert hasattr(ortlm.LanguageModel, name), f"{page.name} names {code}, which a model has not"
        if found := re.search(r"--extra_options ([a-z]\w*=\S+)", code):
            # A name for one of several values stands in capitals.
            parse_extra_options([found[1].replace("NAME", "gptq")], target=find_target("cpu"))


def _is_there(dotted: str) -> bool:
    """Return whether ``dotted`` is a module, or a name in one."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        module = ".".join(parts[:split])
        try:
            # Not imported: what it imports may not be installed.
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            continue
        found = importlib.import_module(module) if split < len(parts) else None
        for name in parts[split:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False
