"""Artifacts that lie on the Hugging Face hub: downloaded once, and verified by the hashes in their ortlm.json."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ortlm._utils.checked_json import shown
from ortlm._utils.formatting import readable_bytes
from ortlm._utils.hashing import sha256_of
from ortlm.artifact.json_values import inside, read_json
from ortlm.artifact.manifest import MANIFEST_FILE
from ortlm.errors import BadArtifact, NotEnoughSpace

# A model's name on the hub, perhaps with a revision.
_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@([^\s@]{1,200}))?")
# The card may be edited on the hub's page, and computes nothing.
CARD_FILE = "README.md"


def is_name(path: str | Path) -> bool:
    """Whether ``path`` can only be a model's name on the hub: of that form, with nothing here that it may mean."""
    text = str(path)
    found = _NAME.fullmatch(text)
    return found is not None and not os.path.lexists(text) and not os.path.lexists(text.partition("/")[0])


def listed_files(manifest: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of each file that the ``ortlm.json`` at ``path`` lists. Raises BadArtifact."""
    info = manifest.get("info")
    listed = info.get("files") if isinstance(info, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise BadArtifact(f"{path} lists no files with their hashes. Build the model again with this ortlm.")
    for name, entry in listed.items():
        inside(name, path)
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or not re.fullmatch("[0-9a-f]{64}", str(digest)):
            raise BadArtifact(f"{path}: info.files has no size and hash for {shown(name)}.")
    return listed


def verify(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise BadArtifact unless the files of ``folder`` are those ``listed``, but for the model card."""
    for name, entry in listed.items():
        if name == CARD_FILE:
            continue
        path = folder / name
        if not path.is_file():
            raise BadArtifact(
                f"{path} is missing, and {MANIFEST_FILE} lists it. Download or build the model again."
            )
        if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise BadArtifact(
                f"{path} is not the file that {MANIFEST_FILE} lists: it has {path.stat().st_size:,} bytes of "
                f"{entry['bytes']:,}, or another SHA-256. It is damaged, or was changed after the build. Delete "
                "it and download or build the model again."
            )


def fetch(wanted: str) -> Path:
    """Download the artifact ``user/name`` or ``user/name@revision``, verify it, and return its folder.

    What is there already is taken; with HF_HUB_OFFLINE, or if the hub does not answer, nothing else is. Raises
    BadArtifact with the way out if there is no such artifact, or if a file is not what its ortlm.json says.
    """
    match = _NAME.fullmatch(wanted)
    assert match is not None
    name, revision = match[1], match[2]
    place = _place(name)
    note = place / "refs" / quote(revision or "main", safe="")
    with _explained(name):
        commit = _commit(name, revision, note)
        folder = place / commit
        done = place / f"{commit}.verified"
        if done.is_file() and (folder / MANIFEST_FILE).is_file():
            return folder
        if not _has_manifest(name, commit, folder):
            raise BadArtifact(
                f"{name} on the hub has no {MANIFEST_FILE}, so that ortlm did not build it. Build a checkpoint "
                f"first: ortlm build -m {name} -o OUT"
            )
        listed = listed_files(read_json(folder / MANIFEST_FILE), folder / MANIFEST_FILE)
        needed = sum(entry["bytes"] for entry in listed.values())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise NotEnoughSpace(
                f"{name} takes {readable_bytes(needed)}, and {place} has {readable_bytes(free)} free."
            )
        _download(name, commit, folder, [MANIFEST_FILE, CARD_FILE, *listed])
    verify(folder, listed)
    done.write_text("", encoding="utf-8")
    return folder


def _place(name: str) -> Path:
    """Return the folder for all revisions of a model: of real files, since graphs may not refer to linked ones."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(cache) / "ortlm" / "hub" / name.replace("/", "--")
    (place / "refs").mkdir(parents=True, exist_ok=True)
    return place


def _commit(name: str, revision: str | None, note: Path) -> str:
    """Return the commit that ``revision`` is now, or was when the hub last answered."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    known = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    if constants.HF_HUB_OFFLINE and known:
        return known
    try:
        found = HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except Exception as error:
        answered = isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", 500) < 500
        if answered or known is None:
            raise
        return known
    if not re.fullmatch("[0-9a-f]{40}", str(found)):
        raise BadArtifact(f"the hub says that {name} is at the commit {shown(found)}, which is none.")
    note.write_text(str(found), encoding="utf-8")
    return str(found)


def _has_manifest(name: str, commit: str, folder: Path) -> bool:
    """Download ``ortlm.json`` into ``folder``, and return whether there is one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, MANIFEST_FILE, revision=commit, local_dir=folder)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return False
    return (folder / MANIFEST_FILE).is_file()


def _download(name: str, commit: str, folder: Path, names: list[str]) -> None:
    import glob

    from huggingface_hub import snapshot_download

    snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=[glob.escape(n) for n in names])


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the hub's library raises into errors of ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise BadArtifact(
            f"{name} is gated: accept its license on its page on the hub, then give a token (HF_TOKEN, or `hf "
            "auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise BadArtifact(
            f"{name} has no such revision on the hub. Leave out what comes after '@'."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadArtifact(
            f"{name} is neither a folder here nor a model on the hub that may be read with this token. Check the "
            "spelling; for a private model give a token (HF_TOKEN, or `hf auth login`)."
        ) from error
    except (BadArtifact, NotEnoughSpace):
        raise
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, and it was not downloaded before"
        else:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise BadArtifact(
            f"{name} is no folder here, and it could not be downloaded: {reason}. What was downloaded so far is "
            "kept; run the same command again to continue."
        ) from error
