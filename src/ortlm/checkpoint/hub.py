"""Finds a checkpoint: a local folder, or a name on the Hugging Face hub that is downloaded and cached."""

from __future__ import annotations

from pathlib import Path

from ortlm.checkpoint import files
from ortlm.checkpoint.open import INDEX_FILE, Checkpoint, open_checkpoint
from ortlm.errors import BadCheckpoint, BadOption

_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md", "NOTICE*")


def find_checkpoint(
    source: str | Path,
    *,
    name: str | None = None,
    cache: Path | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Open ``source``: a folder if there is one of that name, otherwise a model on the hub.

    ``name`` is what a folder's model is called on the hub.

    Downloads into ``cache`` (default: the hub library's own cache), continues one that was interrupted and
    takes what is already there. ``token`` is for gated models; True takes the stored one, False sends none.
    Raises BadCheckpoint if neither a folder nor a model can be had.
    """
    wanted = str(source)
    if Path(wanted).is_dir():
        return open_checkpoint(Path(wanted), source=name)
    if wanted.lower().endswith(".gguf"):
        raise BadOption(
            f"{wanted}: GGUF files are not read yet; give the Hugging Face checkpoint it was made from."
        )
    if Path(wanted).is_absolute() or wanted.startswith((".", "~")) or wanted.count("/") != 1:
        raise BadCheckpoint(
            f"{wanted} is neither a folder here nor a model's name, such as 'microsoft/Phi-3.5-mini-instruct'."
        )
    folder = download(wanted, cache=cache, token=token, revision=revision)
    commit = folder.name if folder.parent.name == "snapshots" else None
    return open_checkpoint(folder, source=wanted, revision=commit)


def download(
    name: str, *, cache: Path | None = None, token: str | bool | None = None, revision: str | None = None
) -> Path:
    """Download what a build needs of the model ``name`` and return the folder.

    Weights in other formats are left alone. Raises BadCheckpoint with the way out if the hub says no.
    """
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The transport's own error has changed its home over the library's versions.
    transport: type[Exception] = getattr(hub_errors, "HTTPError", OSError)
    try:
        small = snapshot_download(
            name, cache_dir=cache, token=token, revision=revision, allow_patterns=list(_SMALL_FILES)
        )
        # Either the shards of the index or the single file: some repositories hold both, or other precisions.
        index = files.read_object(Path(small), INDEX_FILE) if files.present(Path(small), INDEX_FILE) else {}
        shards = index.get("weight_map", {})
        patterns = sorted({str(file) for file in shards.values()}) or ["model.safetensors"]
        folder = Path(
            snapshot_download(
                name,
                cache_dir=cache,
                token=token,
                revision=revision,
                allow_patterns=[*_SMALL_FILES, *patterns],
            )
        )
    except GatedRepoError as error:
        raise BadCheckpoint(
            f"{name} is gated: accept its licence on its page on the hub, then give a token with "
            "--extra_options hf_token=TOKEN, the variable HF_TOKEN, or `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BadCheckpoint(
            f"the hub has no model {name!r} that may be read with this token. Check the spelling; for a folder "
            "on this machine use -i FOLDER; for a private model give a token (HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise BadCheckpoint(f"model {name!r} has no revision {revision!r} on the hub.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, transport, OSError) as error:
        reason = str(error).rstrip(".")
        raise BadCheckpoint(
            f"{name} is not a folder here, and it could not be downloaded: {reason}. What was downloaded so far "
            "is kept; run the same command again to continue, or give a local folder with -i."
        ) from error
    return folder
