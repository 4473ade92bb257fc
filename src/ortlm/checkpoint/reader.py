"""Opens a checkpoint folder and checks that it is whole before anything is built from it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.checkpoint import files, torch_files
from ortlm.checkpoint.quantized import read_quantized
from ortlm.checkpoint.safetensors import FLOATS, Weight, read_header
from ortlm.errors import BadCheckpoint, nearest

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Of files in a checkpoint's folder.
_MOST_FILES = 20_000
_PICKLES = ("consolidated.00.pth",)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder: ``config`` as read from config.json, ``weights`` by tensor name.

    ``source`` is what the user asked for (a name on the hub or a folder), ``revision`` the commit if known.
    ``file`` is the one file that all of it was read from, if it is one; ``folder`` then holds what was made of
    it, as long as ``holds`` is referred to, and ``names`` are what the file calls the model.
    """

    folder: Path
    config: dict[str, Any]
    weights: Mapping[str, Weight]
    source: str
    revision: str | None = None
    file: Path | None = None
    holds: object = None
    names: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where it lies and can be opened again: a folder, or a file."""
        return self.file or self.folder

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in file ``name``, or an empty one if there is no such file."""
        return files.read_object(self.folder, name) if files.present(self.folder, name) else {}

    @property
    def bytes(self) -> int:
        """Size of all weights in the files."""
        return sum(w.bytes for w in self.weights.values())


def open_checkpoint(folder: Path, *, source: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint in ``folder``.

    Raises BadCheckpoint if config.json or the weights are missing or damaged, if an index names a file
    outside the folder, or if a file or a tensor that the index promises is not there.
    """
    if not folder.is_dir():
        raise BadCheckpoint(
            f"{folder} is not a folder. Give a folder that holds config.json and *.safetensors."
        )
    if not files.present(folder, "config.json"):
        if files.present(folder, "genai_config.json"):
            raise BadCheckpoint(
                f"{folder} is a built artifact already; run it with: ortlm generate {folder} ..."
            )
        ggufs = files.listed(folder, "*.gguf", most=_MOST_FILES)
        raise BadCheckpoint(
            f"{folder} has no config.json, so it is not a Hugging Face checkpoint."
            + (f" Of its GGUF files give one: -i {files.shown(folder / ggufs[0])}" if ggufs else "")
        )
    config = files.read_object(folder, "config.json")
    config, weights = read_quantized(config, _weights(folder, config), folder)
    return Checkpoint(folder, config, weights, source or str(folder), revision)


def pick_weights(
    names: Collection[str], config: Mapping[str, Any], read_index: Callable[[str], dict[str, Any]]
) -> tuple[list[str], dict[str, str] | None]:
    """Return which files of a checkpoint hold its weights, and in which each tensor lies where an index says so.

    ``names`` are the files that there are, here or on the hub, ``read_index`` reads one of them. As transformers
    chooses: what config.json names, else model.safetensors, else the shards of the index; a stale index next to
    the whole file counts for nothing. Without any of them all ``*.safetensors`` that are no adapter are taken: one
    ``model.fp16.safetensors``, or shards that lost their index. Without any of these, PyTorch's own files are.
    Raises BadCheckpoint for a damaged index.
    """
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise BadCheckpoint(
                f'config.json: "transformers_weights" is {shown(named)}, expected the name of a *.safetensors '
                "file or of its index."
            )
        if named.endswith(".safetensors"):
            return [_plain(named, "config.json")], None
        return _of_index(_plain(named, "config.json"), read_index)
    if SINGLE_FILE in names:
        return [SINGLE_FILE], None
    if INDEX_FILE in names:
        return _of_index(INDEX_FILE, read_index)
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    # Adapters and Mistral's own layout lie next to the model's weights in some repositories.
    for others in ("adapter_", "consolidated"):
        found = [name for name in found if not name.startswith(others)] or found
    if not found and torch_files.SINGLE_FILE in names:
        return [torch_files.SINGLE_FILE], None
    if not found and torch_files.INDEX_FILE in names:
        return _of_index(torch_files.INDEX_FILE, read_index)
    return found, None


def _of_index(index: str, read_index: Callable[[str], dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    where = read_index(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise BadCheckpoint(f"{index} has no object 'weight_map' of tensor name to file name.")
    return sorted({_plain(file, index) for file in where.values()}), where


def _plain(file: str, source: str) -> str:
    # The name comes from the network and must not reach other files.
    if not file or "/" in file or "\\" in file or ":" in file or file in (".", ".."):
        raise BadCheckpoint(
            f"{source} names the file {shown(file)}; only plain file names within the folder are allowed."
        )
    return file


def _weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Weight]:
    names = files.listed(folder, "*", most=_MOST_FILES)
    chosen, where = pick_weights(names, config, lambda index: files.read_object(folder, index))
    if not chosen:
        raise no_weights(folder, names)
    weights: dict[str, Weight] = {}
    for file in chosen:
        if not files.present(folder, file):
            raise _missing(folder, file, where)
        read = read_header if file.endswith(".safetensors") else torch_files.read_torch_file
        for name, weight in read(folder, file).items():
            if where is not None and where.get(name) != file:
                continue
            if name in weights:
                raise BadCheckpoint(
                    f"weight {shown(name)} is in two files, {weights[name].file.name} and {file}, and there is no "
                    f"{INDEX_FILE} that says which one counts. Keep the files of one set."
                )
            weights[name] = weight
    for name, file in (where or {}).items():
        if name not in weights:
            raise BadCheckpoint(
                f"weight {shown(name)} is not in {files.shown(folder / file)}, where the index says it is. "
                "Download both again."
            )
    return weights


def _missing(folder: Path, file: str, where: Mapping[str, str] | None) -> BadCheckpoint:
    here = [name for name, of in (where or {}).items() if of == file]
    holds = f"; the index says it holds {shown(here[0])} and {len(here) - 1} more weights" if here else ""
    return BadCheckpoint(f"{files.shown(folder / file)} is missing{holds}. Download it again.")


def no_weights(folder: Path, names: Collection[str]) -> BadCheckpoint:
    """Return the error for a checkpoint without weights that can be read, whose files are ``names``."""
    pickles = [name for name in _PICKLES if name in names]
    if pickles:
        return BadCheckpoint(
            f"{folder} holds {pickles[0]}, a pickle, which may run any code when it is opened; ortlm reads "
            "safetensors only. Convert it once with transformers: AutoModelForCausalLM"
            f".from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), then build NEW_FOLDER."
        )
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ggufs:
        return BadCheckpoint(
            f"{folder} holds no *.safetensors file, but {len(ggufs)} in GGUF. Download one, with all of "
            f"its parts, and give the file: -i {shown(ggufs[0])[1:-1]}"
        )
    return BadCheckpoint(f"{folder} holds no *.safetensors file, so there are no weights to build from.")


def check_weights(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str]
) -> None:
    """Raise BadCheckpoint if the weights are not exactly those ``expected`` (name to shape).

    Names that match a pattern in ``ignored`` (``fnmatch``) may be there too.
    """
    found = checkpoint.weights
    missing = [name for name in expected if name not in found]
    if missing:
        where = sorted({w.file.name for w in found.values()})
        raise BadCheckpoint(
            f"weight {missing[0]!r} is missing"
            + (f" (and {len(missing) - 1} more: {', '.join(missing[1:5])}…)" if len(missing) > 1 else "")
            + f" from {checkpoint.path} ({', '.join(where[:4])}{'…' if len(where) > 4 else ''})."
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
