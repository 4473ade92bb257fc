"""The tokenizer is read while the graph is loaded: what is wrong with it is said when it is needed, as before."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.errors import BadArtifact


@pytest.fixture(scope="module")
def folder(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("early") / "out"
    ortlm.build(saved("llama").folder, out, precision="fp32")
    return out


def test_without_a_tokenizer_ids_still_work(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    lm = ortlm.load(tmp_path / "out", threads=1)
    assert lm.generate([3, 4], max_new_tokens=2, temperature=0) is not None
    for _ in range(2):
        with pytest.raises(BadArtifact, match=r"tokenizer\.json is missing"):
            lm.encode("Hello")


def test_a_damaged_tokenizer(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    lm = ortlm.load(tmp_path / "out", threads=1)
    assert lm.logits([3, 4]).shape[0] == 2
    with pytest.raises(BadArtifact, match=r"tokenizer\.json"):
        lm.encode("Hello")


def test_generating_from_text_imports_nothing_for_chats(folder: Path) -> None:
    program = (
        "import sys, ortlm\n"
        f"ortlm.load({str(folder)!r}, threads=1).generate([3, 4], max_new_tokens=2)\n"
        "print(*({'jinja2', 'asyncio', 'importlib.metadata', 'onnx_ir', 'llguidance'} & sys.modules.keys()))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == ""
