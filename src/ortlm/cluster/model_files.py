"""What a model's folder holds, as one hash that is the same on every machine, and how a node gets it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortlm._utils.file_lock import locked
from ortlm._utils.hashing import sha256_of
from ortlm._utils.whole_files import naming
from ortlm.artifact import MANIFEST_FILE
from ortlm.artifact.download import CARD_FILE
from ortlm.artifact.json_values import inside, read_json
from ortlm.errors import BadArtifact, Error

_PIECE_BYTES = 64 << 20
# What evaluations write, and what no answer depends on.
_IGNORED = {CARD_FILE, "report.html", "report.json"}


def model_files(folder: Path) -> dict[str, Path]:
    """Return the files in ``folder``, an artifact or a checkpoint, by their names there, in order."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: found[name]
        for name in sorted(found)
        if name not in _IGNORED and not any(part.startswith(".") for part in name.split("/"))
    }


def model_digest(folder: Path, *, trust: bool = True) -> str:
    """Return the SHA-256 of all in ``folder`` that answers depend on.

    ``trust``: of files whose size is as the build has noted it, its hash is taken instead of read once more.
    """
    files = model_files(folder)
    manifest: dict[str, Any] = {}
    if MANIFEST_FILE in files:
        manifest = read_json(files[MANIFEST_FILE])
    # An evaluation adds its figures there.
    info = manifest.pop("info", None)
    listed = info.get("files") if trust and isinstance(info, dict) else None
    entries = []
    for name, path in files.items():
        entry: Any = listed.get(name) if isinstance(listed, dict) else None
        if name == MANIFEST_FILE:
            digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        elif isinstance(entry, dict) and entry.get("bytes") == path.stat().st_size and entry.get("sha256"):
            digest = str(entry["sha256"])
        else:
            digest = sha256_of(path)
        entries.append([name, digest])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Model:
    """A model for workers, built or a checkpoint: where it lies for whoever gives out the work, and its hash."""

    path: str
    digest: str

    @classmethod
    def of(cls, folder: Path) -> Model:
        """Return that in ``folder``."""
        return cls(str(folder.resolve()), model_digest(folder))


class NoModel(Error):
    """A node has not got the model's folder, or another one in its place."""


# Pieces of files in the object store: name, and references to what it holds.
Pieces = list[tuple[str, list[Any]]]


def put_pieces(folder: Path, put: Callable[[bytes], Any]) -> Pieces:
    """Put the files in ``folder`` into an object store and return references to them."""
    pieces: Pieces = []
    for name, path in model_files(folder).items():
        references = []
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                references.append(put(piece))
        pieces.append((name, references))
    return pieces


def fetch(reference: Any) -> bytes:
    """Return what the object store holds for ``reference``."""
    import ray

    found: bytes = ray.get(reference)
    return found


def folder_of(model: Model, pieces: Pieces | None, get: Callable[[Any], bytes]) -> Path:
    """Return the folder that holds ``model`` on this node.

    That is its own path, if what is there has its hash, as on storage that all nodes share. Else it is fetched
    from ``pieces`` into the user's cache, once for all workers of the node, and its hash is computed from every
    byte. Raises NoModel without pieces, BadArtifact for a copy with another hash.
    """
    own, why = Path(model.path), "is not there"
    if own.is_dir():
        if model_digest(own) == model.digest:
            return own
        why = "holds another model"
    kept = _cache() / model.digest[:40]
    if kept.is_dir():
        return kept
    if pieces is None:
        raise NoModel(f"{own} {why} on {platform.node()}.")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with locked(kept.with_suffix(".lock")):
        # Another worker of this node may have been faster.
        if not kept.is_dir():
            new = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}")
            try:
                for name, references in pieces:
                    path = new / inside(name, new / MANIFEST_FILE)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with naming(path), path.open("xb") as stream:
                        for reference in references:
                            stream.write(get(reference))
                found = model_digest(new, trust=False)
                if found != model.digest:
                    raise BadArtifact(
                        f"the copy of {own} on {platform.node()} has the SHA-256 {found[:12]} instead of "
                        f"{model.digest[:12]}. Try again; if it happens again, build the model again."
                    )
                new.replace(kept)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    return kept


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ortlm" / "nodes"
