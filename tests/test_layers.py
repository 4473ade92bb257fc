"""Who may import whom; the two halves of ortlm meet in ``artifact`` only."""

from __future__ import annotations

import ast
import subprocess
import sys
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
    "target": set(),
    "artifact": set(),
    "tokenization": set(),
    "quant": {"spec"},
    "graph": {"spec", "target", "quant"},
    "weights": {"architectures", "checkpoint", "graph", "quant", "spec"},
    "layerwise": {"checkpoint", "graph", "runtime", "spec", "weights"},
    "calibration": {"artifact", "graph", "layerwise", "quant", "runtime", "spec", "weights"},
    "builder": {
        "architectures", "artifact", "calibration", "checkpoint", "graph", "quant", "spec", "target",
        "tokenization", "weights",
    },
    # Renders chat templates.
    "builder.turn_ends": {"builder", "runtime"},
    # Only these measure what they built.
    "builder.verification": {"builder", "evaluation", "layerwise"},
    "builder.bit_allocation": {"artifact", "builder", "evaluation", "layerwise", "quant", "runtime", "weights"},
    "runtime": {"artifact", "tokenization"},
    "lm_eval": {"runtime"},
    "genai": {"artifact", "runtime"},
    "evaluation": {"artifact", "layerwise", "runtime"},
    "bench": {"artifact", "runtime"},
    "cli": {"artifact", "bench", "builder", "evaluation", "runtime", "target"},
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
    assert set(users) == {"builder/adapter_export.py", "runtime/session.py"}


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
    code = "import sys, ortlm.runtime.generate, ortlm.runtime.guide\nassert 'llguidance' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    for name in ortlm.__all__:
        assert getattr(ortlm, name) is not None
