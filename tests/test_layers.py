"""Who may import whom; the two halves of ortlm meet in ``artifact`` only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import ortlm

SOURCE = Path(ortlm.__file__).parent
# Everyone may use errors, dtypes, the version, and what reads and shows strangers' text.
FREE = {"_utils", "errors", "dtypes", "_version"}
ALLOWED = {
    "errors": set(),
    "dtypes": set(),
    "_utils": set(),
    "spec": set(),
    "architectures": {"spec"},
    "checkpoint": set(),
    # A GGUF file says what its model is in words of its own; each family's file knows them.
    "checkpoint.gguf": {"architectures", "checkpoint"},
    "checkpoint.gguf_config": {"architectures", "checkpoint"},
    "checkpoint.gguf_tokenizer": {"architectures", "checkpoint"},
    "target": set(),
    "artifact": set(),
    "tokenization": set(),
    "quant": {"spec"},
    "graph": {"spec", "target", "quant"},
    "weights": {"architectures", "checkpoint", "graph", "quant", "spec"},
    "layerwise": {"checkpoint", "graph", "quant", "runtime", "spec", "weights"},
    "calibration": {"artifact", "graph", "layerwise", "quant", "runtime", "spec", "weights"},
    "builder": {
        "architectures", "artifact", "calibration", "checkpoint", "graph", "quant", "spec", "target",
        "tokenization", "weights",
    },
    # Renders chat templates.
    "builder.turn_ends": {"builder", "runtime"},
    # Only these measure what they built.
    "builder.verification": {"builder", "evaluation", "layerwise"},
    "builder.bit_allocation": {
        "artifact", "builder", "evaluation", "graph", "layerwise", "quant", "runtime", "target",
    },
    "runtime": {"artifact", "tokenization"},
    "lm_eval": {"runtime", "serving"},
    "genai": {"artifact", "runtime"},
    "serving": {"runtime"},
    "evaluation": {"artifact", "cluster", "layerwise", "runtime"},
    "bench": {"artifact", "runtime"},
    "server": {"artifact", "runtime", "serving"},
    "server.on_ray": {"artifact", "cluster", "runtime", "server", "serving"},
    "cluster": {"artifact"},
    "batch": {"artifact", "cluster", "runtime", "server", "serving"},
    "cli": {
        "artifact", "batch", "bench", "builder", "cluster", "evaluation", "runtime", "server", "serving", "target",
    },
    "__main__": {"cli"},
    "models": {"artifact", "builder", "cli", "target"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Return the parts of ortlm that the file at ``path`` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ortlm.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports(path: Path) -> None:
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    part = name.split(".")[0]
    if part in ("__init__", "_version"):
        return
    part = name if name in ALLOWED else part
    wrong = imports(path) - ALLOWED[part] - FREE - {part}
    assert not wrong, f"{path.name} imports {sorted(wrong)}; {part} may import {sorted(ALLOWED[part])}"


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    named = {p: (SOURCE.name, *p.relative_to(SOURCE).with_suffix("").parts) for p in SOURCE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in named.items()}


def arrows() -> dict[str, set[str]]:
    """Return for every module those that it imports, wherever in the file, for types or when they are used."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & known.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= parts & known.keys() or {node.module}
        found[name] -= {name}
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the first circle of ``graph``, as names in their order; none if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def follow(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph[name]):
            if found := follow(other):
                return found
        done.add(path.pop())
        return []

    return next((found for name in sorted(graph) if (found := follow(name))), [])


def test_no_circle_of_modules() -> None:
    assert " -> ".join(circle(arrows())) == ""


def test_no_circle_of_packages() -> None:
    """``ortlm/__init__.py`` is a module of its own there, since every name of the package begins with it."""
    known = modules()
    room = {
        n: n if p.name == "__init__.py" or n.count(".") == 1 else n.rpartition(".")[0]
        for n, p in known.items()
    }
    graph: dict[str, set[str]] = {name: set() for name in room.values()}
    for name, others in arrows().items():
        graph[room[name]] |= {room[other] for other in others} - {room[name]}
    assert " -> ".join(circle(graph)) == ""


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_few_loose_modules() -> None:
    loose = {p.stem for p in SOURCE.glob("*.py")}
    assert loose == {"__init__", "__main__", "_version", "dtypes", "errors", "lm_eval", "spec", "target"}


def test_who_imports_onnxruntime() -> None:
    users = [
        str(p.relative_to(SOURCE))
        for p in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            name.split(".")[0] == "onnxruntime"
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
        )
    ]
    # A build uses nothing of it but the writer of its adapter files.
    assert set(users) == {
        "builder/adapter_export.py",
        "runtime/engine/devices.py",
        "runtime/engine/session.py",
    }


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from ortlm.cli import main\n"
        "main(['--help']); main(['build', '--help'])\n"
        "heavy = {'onnxruntime', 'onnx_ir', 'numpy', 'onnx', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_running_does_not_load_the_builder() -> None:
    code = (
        "import sys, ortlm\n"
        "ortlm.load, ortlm.Settings\n"
        "assert 'onnx_ir' not in sys.modules and 'ortlm.spec' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_guidance_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys, ortlm.runtime.language_model, ortlm.runtime.structured_output.matcher\n"
        "assert 'llguidance' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    for name in ortlm.__all__:
        assert getattr(ortlm, name) is not None
