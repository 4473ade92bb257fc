"""Prompt caches on disk: what the model has computed for a text, to be taken up again later.

One safetensors file holds the states up to the filled length (of layers with a window the last positions), the
tokens of every row, a fingerprint of the model that computed them, and a checksum of all of it: a state that has
changed by a bit would give other answers without a word.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ortlm._utils.checked_json import check_value, integer, list_of, parse
from ortlm._utils.formatting import one_line
from ortlm.artifact.fields import MOST_TOKENS
from ortlm.dtypes import Array, DType
from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.engine.decode_loop import Loop

_FORMAT = "2"
_PIECE_BYTES = 1 << 20
_ROWS = list_of(list_of(integer(0), most=MOST_TOKENS), most=1 << 20)


def save(loop: Loop, path: Path, *, model: str) -> None:
    """Write the tokens and the cache of ``loop`` to ``path``; ``model`` is the fingerprint of its model.

    The file appears whole or not at all. Raises BadOption if ``path`` holds something else than such a file.
    """
    if path.exists() and not (path.is_file() and _is_ours(path)):
        raise BadOption(
            f"{path} exists and is no prompt cache, so it is not overwritten. Choose another name."
        )
    states = [np.ascontiguousarray(_plain(state)) for state in loop.filled()]
    tokens = json.dumps(loop.history)
    names = [state.name for state in loop.states]
    metadata = {
        "ortlm_prompt_cache": _FORMAT,
        "model": model,
        "tokens": tokens,
        "sha256": _checksum(tokens, names, states),
    }
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        save_file(dict(zip(names, states, strict=True)), unfinished, metadata)
        unfinished.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def restore(loop: Loop, path: Path, *, model: str) -> None:
    """Let ``loop`` resume from what ``save`` wrote to ``path``.

    Raises BadArtifact if the file is damaged, or if another model or a longer context wrote it.
    """
    if not path.is_file():
        raise BadOption(f"{path} is not there. A prompt cache is what Generator.save writes.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check(metadata, path, model=model)
            history = _history(metadata, path)
            states = [file.get_tensor(state.name) for state in loop.states]
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
    ) as error:
        if isinstance(error, BadOption):
            raise
        raise BadArtifact(
            f"{path} cannot be read as a prompt cache: {one_line(error)}. Write it again."
        ) from error
    if _checksum(metadata["tokens"], [state.name for state in loop.states], states) != metadata.get("sha256"):
        raise BadArtifact(
            f"{path} is damaged: its contents do not have the checksum that it names. Write it again."
        )
    longest = max(map(len, history))
    if longest > loop.context_tokens:
        raise BadArtifact(f"{path} holds {longest} tokens, but the context holds {loop.context_tokens}.")
    for found, wanted in zip(states, loop.states, strict=True):
        shape = wanted.shape(len(history), longest)
        if found.shape != shape or found.dtype != _plain_dtype(wanted.dtype):
            raise BadArtifact(
                f"{path}: {wanted.name} is {found.dtype} {list(found.shape)}, but the model's is "
                f"{wanted.dtype.name} {list(shape)}. Write it again with this model."
            )
    loop.adopt(
        history, [found.view(state.dtype.numpy) for found, state in zip(states, loop.states, strict=True)]
    )


def fingerprint(files: Iterable[Path]) -> str:
    """Return a hash of ``files``: their sizes, and the beginning, middle and end of each.

    Cheap for files of many gigabytes, and different for any two models that were built.
    """
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for at in (0, max(0, size // 2 - _PIECE_BYTES // 2), max(0, size - _PIECE_BYTES)):
                file.seek(at)
                found.update(file.read(_PIECE_BYTES))
    return found.hexdigest()


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            return "ortlm_prompt_cache" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _check(metadata: dict[str, str], path: Path, *, model: str) -> None:
    found = metadata.get("ortlm_prompt_cache")
    if found != _FORMAT:
        what = (
            "is no prompt cache"
            if found is None
            else f"has format {found!r}, and this ortlm reads {_FORMAT!r}"
        )
        raise BadArtifact(f"{path} {what}. Write it again with Generator.save.")
    if metadata.get("model") != model:
        raise BadArtifact(
            f"{path} was written by another model (or another build, or with another adapter). Its cache means "
            "nothing to this one; write it again."
        )


def _history(metadata: dict[str, str], path: Path) -> list[list[int]]:
    try:
        found = parse(metadata["tokens"], where=path, error=BadArtifact)
        rows: list[list[int]] = check_value(found, _ROWS, file=path, error=BadArtifact, at="tokens")
    except (KeyError, BadArtifact) as error:
        raise BadArtifact(f"{path} is damaged: its tokens cannot be read. Write it again.") from error
    if not rows or not all(rows):
        raise BadArtifact(f"{path} is damaged: it holds no tokens. Write it again.")
    return rows


def _checksum(tokens: str, names: Iterable[str], states: Iterable[Array]) -> str:
    """Return a hash of all that a cache holds but its model's fingerprint, which is compared itself."""
    found = hashlib.sha256(tokens.encode())
    for name, state in zip(names, states, strict=True):
        found.update(f"\n{name} {state.dtype} {state.shape}\n".encode())
        found.update(np.ascontiguousarray(state).view(np.uint8).data if state.size else b"")
    return found.hexdigest()


def _plain(state: Array) -> Array:
    """Return ``state`` as numbers that every reader knows: bf16 is none of numpy's own."""
    return state if state.dtype.kind in "fiu" else state.view(np.uint16)


def _plain_dtype(dtype: DType) -> np.dtype[Any]:
    own = np.dtype(dtype.numpy)
    return own if own.kind in "fiu" else np.dtype(np.uint16)
