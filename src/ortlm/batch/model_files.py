"""What a model's folder holds, as one hash: on whichever machine it lies, the same model has the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ortlm._utils.hashing import sha256_of
from ortlm.artifact import MANIFEST_FILE, Artifact
from ortlm.artifact.download import CARD_FILE

# What evaluations write, and what no answer depends on.
_IGNORED = {CARD_FILE, "report.html", "report.json"}


def model_files(artifact: Artifact) -> dict[str, Path]:
    """Return the files of ``artifact`` by their names within its folder, in order."""
    found = {
        path.relative_to(artifact.path).as_posix(): path
        for path in artifact.path.rglob("*")
        if path.is_file()
    }
    return {
        name: found[name]
        for name in sorted(found)
        if name not in _IGNORED and not any(part.startswith(".") for part in name.split("/"))
    }


def model_digest(artifact: Artifact, *, trust: bool = True) -> str:
    """Return the SHA-256 of all that answers depend on.

    ``trust``: of files whose size is as the build has noted it, its hash is taken instead of read once more.
    """
    listed = artifact.manifest.info.get("files")
    listed = listed if trust and isinstance(listed, dict) else {}
    entries = []
    for name, path in model_files(artifact).items():
        entry: Any = listed.get(name)
        if name == MANIFEST_FILE:
            # An evaluation adds its figures there.
            value = json.loads(path.read_text(encoding="utf-8"))
            value.pop("info", None)
            digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        elif isinstance(entry, dict) and entry.get("bytes") == path.stat().st_size and entry.get("sha256"):
            digest = str(entry["sha256"])
        else:
            digest = sha256_of(path)
        entries.append([name, digest])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
