"""Where artifacts came from, remembered on the machine that built them: no path goes into an artifact."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortlm.artifact import Manifest


@dataclass(frozen=True, slots=True)
class Origin:
    """A checkpoint, a folder, a file or a name on the hub, and the adapters that became part of its weights.

    Each adapter is a folder and the number that it was multiplied by.
    """

    source: str
    adapters: tuple[tuple[str, float], ...] = ()


def remember(manifest: Manifest, checkpoint: Path, adapters: Sequence[tuple[Path, float]]) -> None:
    """Note that ``checkpoint`` was built into the artifact of ``manifest``, where notes can be kept."""
    path = _note(manifest)
    if path is None:
        return
    found = {
        "source": str(checkpoint.resolve()),
        "adapters": [[str(folder.resolve()), weight] for folder, weight in adapters],
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")


def recall(manifest: Manifest) -> Origin | None:
    """Return what the artifact of ``manifest`` was built from here, if that is known and still there."""
    path = _note(manifest)
    if path is None:
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        origin = Origin(str(found["source"]), tuple((str(a), float(n)) for a, n in found["adapters"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    there = all(Path(p).exists() for p in (origin.source, *(folder for folder, _ in origin.adapters)))
    return origin if there else None


def _note(manifest: Manifest) -> Path | None:
    """Return the file for the artifact, which is known by its weights."""
    files = manifest.info.get("files")
    hashes = [
        str(entry.get("sha256"))
        for name, entry in (files.items() if isinstance(files, dict) else ())
        if name.endswith((".onnx.data", ".onnx_data")) and isinstance(entry, dict)
    ]
    if not hashes:
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ortlm" / "built" / f"{hashes[0][:40]}.json"


def public_name(source: str) -> str:
    """Return a model's name on the hub as it is, and a folder's last part only.

    A path on the builder's machine says nothing to others, and may say too much.
    """
    if source.count("/") == 1 and not Path(source).exists() and source[0] not in "./~":
        return source
    return Path(source).resolve().name
