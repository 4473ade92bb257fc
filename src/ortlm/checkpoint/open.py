"""Opens a checkpoint folder and checks that it is whole before anything is built from it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortlm.checkpoint.safetensors import FLOATS, Weight, read_header
from ortlm.errors import BadCheckpoint, nearest

INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder: ``config`` as read from config.json, ``weights`` by tensor name.

    ``source`` is what the user asked for (a name on the hub or a folder), ``revision`` the commit if known.
    ``missing`` names tensors that the index promises and no file holds.
    """

    folder: Path
    config: dict[str, Any]
    weights: Mapping[str, Weight]
    source: str
    revision: str | None = None

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in file ``name``, or an empty one if there is no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @property
    def bytes(self) -> int:
        """Size of all weights in the files."""
        return sum(w.bytes for w in self.weights.values())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; raises BadCheckpoint if it holds none."""
    try:
        # Some editors put a byte order mark first.
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{path} must hold a JSON object, found {type(found).__name__}.")
    return found


def open_checkpoint(folder: Path, *, source: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint in ``folder``.

    Raises BadCheckpoint if config.json or the weights are missing or damaged, if an index names a file
    outside the folder, or if a file or a tensor that the index promises is not there.
    """
    if not folder.is_dir():
        raise BadCheckpoint(
            f"{folder} is not a folder. Give a folder that holds config.json and *.safetensors."
        )
    if not (folder / "config.json").is_file():
        if (folder / "genai_config.json").is_file():
            raise BadCheckpoint(
                f"{folder} is a built artifact already; run it with: ortlm generate {folder} ..."
            )
        raise BadCheckpoint(f"{folder} has no config.json, so it is not a Hugging Face checkpoint.")
    config = read_json(folder / "config.json")
    return Checkpoint(folder, config, _weights(folder), source or str(folder), revision)


def _weights(folder: Path) -> dict[str, Weight]:
    if (folder / INDEX_FILE).is_file():
        return _indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            raise BadCheckpoint(
                f"{folder} holds {pickles[0]}, a pickle, which may run any code when it is opened; ortlm reads "
                "safetensors only. Convert it once with transformers: AutoModelForCausalLM"
                f".from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), then build NEW_FOLDER."
            )
        raise BadCheckpoint(f"{folder} holds no *.safetensors file, so there are no weights to build from.")
    # Adapter files lie beside the model's weights in some fine-tunes; they are not part of it.
    files = [f for f in files if not f.name.startswith("adapter_")] or files
    named = [f for f in files if f.name == "model.safetensors"]
    weights: dict[str, Weight] = {}
    for file in named or files:
        for name, weight in read_header(file).items():
            if name in weights:
                raise BadCheckpoint(
                    f"weight {name!r} is in two files, {weights[name].file.name} and {file.name}, and there is "
                    f"no {INDEX_FILE} that says which one counts."
                )
            weights[name] = weight
    return weights


def _indexed(folder: Path) -> dict[str, Weight]:
    index = folder / INDEX_FILE
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise BadCheckpoint(f"{index} has no object 'weight_map' of tensor name to file name.")
    shards: dict[str, dict[str, Weight]] = {}
    for file in sorted(set(names.values())):
        # A plain name only: the index comes from the network and must not reach other files.
        if Path(file).name != file or file in ("", ".", ".."):
            raise BadCheckpoint(
                f"{index} names the file {file!r}; only plain file names within {folder} are allowed."
            )
        # Longer names do not exist on any common disk, and asking for them is an error of its own.
        if len(file) > 255 or not (folder / file).is_file():
            wanted = next(name for name, where in names.items() if where == file)
            raise BadCheckpoint(
                f"{folder / file} is missing; {index.name} says it holds {wanted!r} and "
                f"{sum(where == file for where in names.values()) - 1} more weights. Download it again."
            )
        shards[file] = read_header(folder / file)
    weights = {}
    for name, file in names.items():
        if name not in shards[file]:
            raise BadCheckpoint(f"weight {name!r} is not in {folder / file}, where {index.name} says it is.")
        weights[name] = shards[file][name]
    return weights


def check_weights(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str]
) -> None:
    """Raise BadCheckpoint if the weights are not exactly those ``expected`` (name to shape).

    Names that match a pattern in ``ignored`` (``fnmatch``) may be there too.
    """
    found = checkpoint.weights
    missing = [name for name in expected if name not in found]
    if missing:
        files = sorted({w.file.name for w in found.values()})
        raise BadCheckpoint(
            f"weight {missing[0]!r} is missing"
            + (f" (and {len(missing) - 1} more: {', '.join(missing[1:5])}…)" if len(missing) > 1 else "")
            + f" from {checkpoint.folder} ({', '.join(files[:4])}{'…' if len(files) > 4 else ''})."
            + nearest(missing[0], found)
            + " Usual cause: an incomplete download, or a config.json of another model."
        )
    for name, shape in expected.items():
        weight = found[name]
        if weight.shape != shape:
            raise BadCheckpoint(
                f"weight {name!r} has shape {list(weight.shape)}; config.json implies {list(shape)}. "
                f"File: {weight.file.name}. Usual cause: config.json belongs to another size of this family."
            )
        if weight.dtype.name not in FLOATS:
            raise BadCheckpoint(
                f"weight {name!r} in {weight.file.name} has element type {weight.dtype.safetensors}; "
                "ortlm reads BF16, F16 and F32. Use the unquantized checkpoint of this model."
            )
    extra = [
        name
        for name in found
        if name not in expected and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
    ]
    if extra:
        raise BadCheckpoint(
            f"weight {extra[0]!r} in {found[extra[0]].file.name} is not part of the model that config.json "
            f"describes"
            + (f", nor are {len(extra) - 1} more ({', '.join(extra[1:5])}…)" if extra[1:] else "")
            + ". Leaving it out could change what the model says. Usual cause: an adapter that was not merged, "
            "or a config.json with too few layers."
        )
