"""A folder in which the names exist that the pages use: models, checkpoints, adapters and files, all tiny."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import ortlm
from tests.checkpoint.gguf_bytes import file_of, smallest
from tests.docs.pages import ROOT

TINY = ROOT / "models" / "tiny-phi3"

# What stands on the pages, and what is used here in its place.
REPLACED = {
    "microsoft/Phi-3.5-mini-instruct": "tiny-phi3",
    "microsoft/Phi-3.5-vision-instruct": "tiny-vision",
    "models/tiny-phi3": "tiny-phi3",
    "https://example.org/b.png": "b.png",
    "hellaswag,gsm8k": "own_choice",
    "hellaswag": "own_choice",
    "arc_easy": "own_choice",
}

_TASK = """\
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: tasks/rows.json
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def _checkpoint(path: Path) -> None:
    """Write the first layer of the shipped model, which is enough to run a command and takes least time."""
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "num_hidden_layers": 1})
    (path / "config.json").write_text(text, encoding="utf-8")
    with safe_open(TINY / "model.safetensors", framework="np") as file:
        names = [name for name in file.keys() if not re.search(r"layers\.[1-9]", name)]  # noqa: SIM118 - no mapping
        save_file({name: file.get_tensor(name) for name in names}, path / "model.safetensors")


def _build(path: Path, *, precision: str = "int4") -> None:
    source = path.parent / "tiny-phi3"
    if not source.is_dir():
        _checkpoint(source)
    ortlm.build(source, path, precision=precision)


def _vision_checkpoint(path: Path) -> None:
    from tests.vision import checkpoint

    checkpoint.save(path)


def _build_vision(path: Path) -> None:
    source = path.parent / "tiny-vision"
    if not source.is_dir():
        _vision_checkpoint(source)
    ortlm.build(source, path)


def _adapter(seed: int) -> Callable[[Path], None]:
    """Return what writes a random LoRA of rank 4 for the shipped model, as peft does."""

    def write(path: Path) -> None:
        path.mkdir()
        random = np.random.default_rng(seed)
        tensors = {}
        for part, rows in (("qkv_proj", 384), ("o_proj", 256)):
            name = f"base_model.model.model.layers.0.self_attn.{part}"
            tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.05, (4, 256)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.05, (rows, 4)).astype(np.float32)
        save_file(tensors, path / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj"], "bias": "none",
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    return write


def _text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content, encoding="utf-8") and None


def _lines(*rows: object) -> Callable[[Path], None]:
    return _text("".join(json.dumps(row) + "\n" for row in rows))


def _gguf(path: Path) -> None:
    path.write_bytes(file_of(*smallest()))


def _image(path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize((120, 90)).save(path)


def _tasks(path: Path) -> None:
    importlib.import_module("lm_eval")  # where it is not installed, the page is skipped
    path.mkdir()
    rows = [{"question": f"def f{i}(x):", "choices": [" return", " zzz"], "answer": 0} for i in range(2)]
    (path / "rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (path / "own_choice.yaml").write_text(_TASK, encoding="utf-8")


_SOURCES = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "scripts").glob("*.py")))
_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# Name to what makes it. A page gets what it names.
MAKERS: dict[str, Callable[[Path], None]] = {
    "tiny-phi3": _checkpoint,
    "tiny-vision": _vision_checkpoint,
    "my-fine-tune": _checkpoint,
    "base": _checkpoint,
    "model.gguf": _gguf,
    "french-lora": _adapter(1),
    "code-lora": _adapter(2),
    "phi": _build,
    "phi-fp32": lambda path: _build(path, precision="fp32"),
    "phi-small": _build,
    "phi-vision": _build_vision,
    "handbook.txt": _text(_SOURCES),
    "chats.jsonl": _lines(*({"text": part} for part in _SOURCES.split("\n\n") if part.strip())),
    "requests.jsonl": _lines(
        {
            "custom_id": "question-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "phi", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
        }
    ),
    "prompts.jsonl": _lines("The capital of France is", {"prompt": [{"role": "user", "content": "Hello"}]}),
    "question.txt": _text("What does os.path.join do?\n"),
    "manual.txt": _text("os.path.join joins one or more parts of a path.\n"),
    "letter.txt": _text("Dear reader,\n\nthe tests ran.\n"),
    "texts.txt": _text("A cat sleeps.\nA dog barks.\n"),
    "edit-this.txt": _text("Repeat this: def f(x): return x\n"),
    "city.json": _text(json.dumps(_SCHEMA)),
    "a.jpg": _image,
    "b.png": _image,
    "tasks": _tasks,
}


class Sandbox:
    """Makes what pages need, each thing once, and folders in which a page's blocks run."""

    def __init__(self, folder: Path) -> None:
        self._store = folder / "store"
        self._pages = folder / "pages"
        self._store.mkdir(parents=True)
        self._bin = folder / "bin"
        self._bin.mkdir()
        script = Path(__file__).with_name("command.py")
        for name in ("ortlm", "lm_eval"):
            program = self._bin / name
            program.write_text(
                f'#!/bin/sh\nexec "{sys.executable}" "{script}" {name} "$@"\n', encoding="utf-8"
            )
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def folder_for(self, page: str, text: str) -> Path:
        """Return a new folder with everything that ``text`` names."""
        folder = self._pages / page.replace("/", "-")
        folder.mkdir(parents=True)
        for name in MAKERS:
            # Tasks of the harness are named by what is in them.
            word = "own_choice" if name == "tasks" else re.escape(name)
            if re.search(rf"(?<![\w.-]){word}(?![\w.-]*\w)", text):
                self._put(name, folder)
        return folder

    def _put(self, name: str, folder: Path) -> None:
        made = self._store / name
        if not made.exists():
            MAKERS[name](made)
        (shutil.copytree if made.is_dir() else shutil.copy)(made, folder / name)

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables of a shell in which `ortlm` and `python` are those of the tests."""
        paths = [str(self._bin), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            **os.environ,
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": os.pathsep.join([str(Path(ortlm.__file__).parents[1]), str(ROOT)]),
            "HF_DATASETS_CACHE": str(self._store / "datasets"),
            "COLUMNS": "100",
        }


def localized(code: str) -> str:
    """Return ``code`` with what is on the hub or the web replaced by what is here."""
    for name, here in REPLACED.items():
        code = code.replace(name, here)
    return code
