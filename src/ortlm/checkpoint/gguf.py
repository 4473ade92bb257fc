"""Opens GGUF files as the checkpoint that they were made from."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.architectures import find_gguf
from ortlm.checkpoint import files
from ortlm.checkpoint.gguf_config import gguf_config, gguf_weights
from ortlm.checkpoint.gguf_header import Header, TensorInfo, read_header
from ortlm.checkpoint.gguf_tokenizer import tokenizer_files
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadCheckpoint, UnsupportedModel

_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE | re.DOTALL)
_MOST_PARTS = 10_000
_NAMES = ("name", "basename", "finetune", "source.url", "source.repo_url")


class _Folder:
    """A folder for the small files of a checkpoint, which goes when nothing refers to this any longer."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ortlm-gguf-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def open_gguf(path: Path, *, source: str | None = None) -> Checkpoint:
    """Open the GGUF file ``path``, or all parts of the model that it is a part of.

    Weights are dequantized as they are read. What the metadata says becomes ``config``, and in a folder of its
    own the tokenizer's files. Raises BadCheckpoint for files that are damaged or missing, and UnsupportedModel
    for what is not known and might change what the model computes.
    """
    headers = _headers(path)
    metadata, where = headers[0].metadata, files.shown(headers[0].path)
    tensors = _tensors(headers)
    name = _architecture(metadata, where)
    mixture = metadata.get(f"{name}.expert_count", 0) not in (0, None)
    form = find_gguf(name, where, mixture=mixture)
    config = gguf_config(metadata, tensors, form, where)
    weights = gguf_weights(tensors, form, config)
    texts, ids = tokenizer_files(metadata, form, config["vocab_size"], where)
    folder = _Folder()
    for name, text in {**texts, **_card(metadata)}.items():
        (folder.path / name).write_text(text, encoding="utf-8")
    return Checkpoint(
        folder=folder.path,
        config=config | ids,
        weights=weights,
        source=source or str(path),
        file=headers[0].path,
        holds=folder,
        names=tuple(v for v in (metadata.get(f"general.{key}") for key in _NAMES) if isinstance(v, str)),
    )


def _headers(path: Path) -> list[Header]:
    """Return the headers of all parts of the model, the first one first."""
    named = _PART.fullmatch(path.name)
    if named is None:
        header = read_header(path)
        count = header.metadata.get("split.count", 1)
        if count not in (0, 1):
            raise BadCheckpoint(
                f"{files.shown(path)} is one of {shown(count)} parts, and its name does not say which. Name the "
                f"parts as they were: NAME-00001-of-{count if isinstance(count, int) else 0:05d}.gguf."
            )
        return [header]
    count = int(named[3])
    if not 1 <= count <= _MOST_PARTS:
        raise BadCheckpoint(
            f"{files.shown(path)} is one of {count} parts by its name; expected 1 to {_MOST_PARTS}."
        )
    paths = [path.with_name(f"{named[1]}-{at:05d}-of-{named[3]}.gguf") for at in range(1, count + 1)]
    missing = [p for p in paths if not files.present(p.parent, p.name)]
    if missing:
        raise BadCheckpoint(
            f"{files.shown(missing[0])} is missing"
            + (
                f", and {len(missing) - 1} more of the {count} parts"
                if missing[1:]
                else f", one of {count} parts"
            )
            + ". Put all parts into one folder."
        )
    headers = [read_header(p) for p in paths]
    for at, header in enumerate(headers):
        stated = (header.metadata.get("split.no"), header.metadata.get("split.count"))
        if stated != (at, count):
            raise BadCheckpoint(
                f"{files.shown(header.path)} is part {at + 1} of {count} by its name, and in it "
                f'"split.no" is {shown(stated[0])} and "split.count" is {shown(stated[1])}. It was renamed, or '
                "belongs to another model."
            )
    return headers


def _tensors(headers: list[Header]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for header in headers:
        for info in header.tensors:
            if info.name in found:
                raise BadCheckpoint(
                    f"the tensor {shown(info.name)} is in both {found[info.name].stamp.path.name} and "
                    f"{header.path.name}. The parts belong to different models."
                )
            found[info.name] = info
    stated = headers[0].metadata.get("split.tensors.count")
    if len(headers) > 1 and stated is not None and stated != len(found):
        raise BadCheckpoint(
            f"the {len(headers)} parts of {headers[0].path.name} hold {len(found):,} tensors, and its header "
            f"says {shown(stated)}. A part belongs to another model, or is damaged."
        )
    return found


def _architecture(metadata: Mapping[str, Any], where: str) -> str:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(
            f'{where}: "general.type" is {shown(kind)}, and only models can be built. Give the file of the model.'
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise BadCheckpoint(
            f'{where}: "general.architecture" is {shown(name)}, expected the name of a family.'
        )
    version = metadata.get("general.quantization_version", 2)
    if version != 2:
        raise UnsupportedModel(
            f'{where}: "general.quantization_version" is {shown(version)}, and ortlm reads 2. Convert the model '
            "again with a current llama.cpp."
        )
    return name


def _card(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return a model card with the license that the file states."""
    stated = metadata.get("general.license")
    if not isinstance(stated, str) or not stated.strip():
        return {}
    words = " ".join(stated.split())[:200].replace("\\", "").replace('"', "")
    return {"README.md": f'---\nlicense: "{words}"\n---\n'}
