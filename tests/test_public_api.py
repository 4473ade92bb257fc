"""What `import ortlm` gives: documented, typed, quick to import."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ortlm

CLASSES = [getattr(ortlm, name) for name in ortlm.__all__ if inspect.isclass(getattr(ortlm, name))]
ARRAYS = re.compile(r"NDArray|Logits|Tokens")


# Where the arguments are those of another function.
ELSEWHERE = re.compile(r"(see|as for) ``\w+``")


def source_of(function: Callable[..., Any]) -> ast.AST:
    """Return a function's syntax tree."""
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def is_assigned_to_self(node: ast.Attribute) -> bool:
    """Whether ``node`` is a public attribute that is assigned, self.name = ..."""
    of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
    return of_self and isinstance(node.ctx, ast.Store) and not node.attr.startswith("_")


def functions() -> Iterator[tuple[str, Any]]:
    """Yield every public function and method under its name."""
    for name in ortlm.__all__:
        item = getattr(ortlm, name)
        if inspect.isfunction(item):
            yield name, item
        elif inspect.isclass(item):
            for base in item.__mro__:
                for key, member in vars(base).items():
                    if base.__module__.startswith("ortlm") and not key.startswith("_"):
                        plain = (
                            member.fget
                            if isinstance(member, property)
                            else getattr(member, "__func__", member)
                        )
                        if inspect.isfunction(plain):
                            yield f"{item.__name__}.{key}", plain


FUNCTIONS = dict(functions())


def test_every_name_is_there_and_documented() -> None:
    assert sorted(ortlm.__all__) == sorted(set(ortlm.__all__))
    for name in ortlm.__all__:
        item = getattr(ortlm, name)
        assert name == "__version__" or item.__doc__, f"{name} has no docstring"
    assert {*ortlm.__all__} <= {*dir(ortlm)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name: str) -> None:
    function = FUNCTIONS[name]
    documented = inspect.getdoc(function) or ""
    assert documented, f"{name} has no docstring"
    signature = inspect.signature(function)
    if ARRAYS.search(str(signature.return_annotation)):
        assert re.search(r"(float32|int64|bool) \[", documented), (
            f"{name} returns an array: of which type and shape?"
        )
    if not ELSEWHERE.search(documented):
        for parameter in signature.parameters.keys() - {"self", "cls"}:
            assert f"``{parameter}" in documented, f"{name} does not explain {parameter}"
    raised = {
        "BadOption" if error == "refused" else error
        for node in ast.walk(source_of(function))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for error in [ast.unparse(node.exc.func)]
    }
    for error in raised:
        assert error in documented, f"{name} raises {error}, which its docstring does not say"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_classes_explain_what_they_hold(cls: type) -> None:
    documented = inspect.getdoc(cls) or ""
    if dataclasses.is_dataclass(cls):
        names = {field.name for field in dataclasses.fields(cls)}
    else:
        made = source_of(vars(cls)["__init__"])
        names = {
            node.attr
            for node in ast.walk(made)
            if isinstance(node, ast.Attribute) and is_assigned_to_self(node)
        }
    for name in names:
        assert f"``{name}``" in documented, f"{cls.__name__} does not explain {name}"


def test_importing_is_silent_and_light() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import ortlm\n"
        "there = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'asyncio', 'http', 'inspect', 'json', 'logging', 're', 'ssl', 'subprocess', 'typing'}\n"
        "assert there - sys.stdlib_module_names == {'ortlm'}, there\n"
        "assert not there & heavy, there & heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
