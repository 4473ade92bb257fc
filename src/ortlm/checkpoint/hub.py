"""Finds a checkpoint: a local folder, or a name on the Hugging Face hub that is downloaded and cached."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from ortlm._utils.checked_json import shown
from ortlm.checkpoint import files
from ortlm.checkpoint.gguf_header import is_gguf
from ortlm.checkpoint.reader import Checkpoint, no_weights, open_checkpoint, pick_weights
from ortlm.errors import BadCheckpoint, BadOption

_log = logging.getLogger(__name__)
_TEMPLATES = "additional_chat_templates/"
_SMALL_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_MOMENT_SECONDS = 3.0
_EXAMPLE = "microsoft/Phi-3.5-mini-instruct"
_PLAIN = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# The hub's pages, and how git spells them.
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)(?:/([\w.-]{1,96}/[\w.-]{1,96}?))?(?:\.git)?(?:[/?#].*)?$"
    r"|git@hf\.co:.*$",
    re.IGNORECASE | re.DOTALL,
)


def find_checkpoint(
    source: str | Path,
    *,
    name: str | None = None,
    cache: Path | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Checkpoint:
    """Open ``source``: a folder or a GGUF file if there is one of that name, otherwise a model on the hub.

    ``name`` is what its model is called on the hub. ``revision`` is a branch, a tag or a commit there, which may
    stand after the name too, ``user/name@revision``; ``subfolder`` is where in the repository the model lies. A
    folder of the hub library's cache stands for the revision in it.

    Downloads into ``cache`` (default: the hub library's own cache), continues one that was interrupted and
    takes what is already there. ``token`` is for gated models; True takes the stored one, False sends none.
    Raises BadCheckpoint if neither a folder nor a model can be had.
    """
    wanted = str(source)
    if _is_folder(wanted):
        _check_local(wanted, revision, subfolder)
        return _open_folder(Path(wanted), name)
    if is_gguf(Path(wanted)):
        _check_local(wanted, revision, subfolder)
        # The package that dequantizes takes a while to import.
        from ortlm.checkpoint.gguf import open_gguf

        return open_gguf(Path(wanted), source=name)
    if _is_file(wanted):
        raise BadCheckpoint(
            f"{shown(wanted)} is a file, but not in GGUF. Give the folder that holds the checkpoint."
        )
    wanted, revision = with_revision(wanted, revision)
    check_name(wanted)
    folder = download(wanted, cache=cache, token=token, revision=revision, subfolder=subfolder)
    return open_checkpoint(folder, source=wanted, revision=_commit_of(folder))


def with_revision(wanted: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return name and revision of ``user/name@revision``. Raises BadOption if ``revision`` is another one."""
    name, at, after = wanted.partition("@")
    if not at or not _PLAIN.fullmatch(name):
        return wanted, revision
    if not after:
        raise BadOption(f"{shown(wanted)} has no revision after '@': give a branch, a tag or a commit.")
    if revision not in (None, after):
        raise BadOption(f"{shown(wanted)} and --revision {revision} name two revisions. Give one of them.")
    return name, after


def _check_local(wanted: str, revision: str | None, subfolder: str | None) -> None:
    for option, value in (("--revision", revision), ("--subfolder", subfolder)):
        if value is not None:
            raise BadOption(
                f"{option} {value} is for models on the hub, and {shown(wanted)} is on this machine. Leave it "
                "out, or give the folder itself."
            )


def _open_folder(folder: Path, name: str | None) -> Checkpoint:
    """Open a local folder: a checkpoint, or a model in the hub library's cache, of which one revision is meant."""
    snapshots = folder / "snapshots"
    if (
        not folder.name.startswith("models--")
        or files.present(folder, "config.json")
        or not snapshots.is_dir()
    ):
        return open_checkpoint(folder, source=name, revision=_commit_of(folder))
    there = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    chosen = commit if commit in there else there[0] if len(there) == 1 else None
    if chosen is None:
        raise BadCheckpoint(
            f"{files.shown(folder)} is a model in the hub's cache with {len(there)} revisions, and says of none "
            f"that it is the main one. Give one: -i {files.shown(snapshots / there[0]) if there else 'FOLDER'}"
        )
    own = folder.name.removeprefix("models--").replace("--", "/")
    return open_checkpoint(snapshots / chosen, source=name or own, revision=chosen)


def _commit_of(folder: Path) -> str | None:
    """Return the commit that a folder of the hub library's cache is of, or lies in."""
    path = folder.absolute()
    return next((one.name for one in (path, *path.parents) if one.parent.name == "snapshots"), None)


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except (OSError, ValueError):  # too long for any, or not a path at all
        return False


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def check_name(wanted: str) -> None:
    """Raise BadOption, with what was probably meant, if ``wanted`` cannot be a model's name on the hub.

    Raises BadCheckpoint for what looks like a folder that is not there.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    told = shown(wanted)
    if wanted.lower().endswith(".gguf"):
        raise BadOption(
            f"{told} is not there. Give the path of a GGUF file, of a split model that of any part."
        )
    address = _ADDRESS.match(wanted)
    if address is not None:
        meant = f"-m {address[1]}" if address[1] else "-m ORGANIZATION/NAME"
        raise BadOption(f"{told} is an address; a model on the hub is given by its name: {meant}.")
    if "://" in wanted:
        raise BadOption(
            f"{told} is an address, and models are read from the hub or from folders: -m NAME, -i DIR."
        )
    if wanted != wanted.strip() or not wanted:
        raise BadOption(f"{told} has blanks around it, or is empty; a model's name is like {_EXAMPLE}.")
    if wanted.startswith((".", "~", "/", "\\")) or (len(wanted) < 300 and Path(wanted).is_absolute()):
        raise BadCheckpoint(f"{told} is neither a folder here nor a model's name, such as {_EXAMPLE}.")
    if wanted.endswith(".git") and _PLAIN.fullmatch(wanted.removesuffix(".git")):
        raise BadOption(f"{told} ends in .git, which no model's name does: -m {wanted.removesuffix('.git')}.")
    if wanted.count("/") != 1:
        raise BadCheckpoint(
            f"{told} is neither a folder here nor a model's name, which has one slash, as in {_EXAMPLE}. For a "
            "folder give -i DIR."
        )
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        raise BadOption(
            f"{told} cannot be a model's name on the hub: names are ORGANIZATION/NAME, of at most 96 letters, "
            f"digits, '-', '_' and '.', as in {_EXAMPLE}. For a folder give -i DIR."
        ) from error


def download(
    name: str,
    *,
    cache: Path | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Download what a build needs of the model ``name``, or of what lies in its ``subfolder``; return the folder.

    Weights in other formats are left alone. A hub that does not answer within ten seconds (the hub library's
    HF_HUB_ETAG_TIMEOUT) is left alone too, and what was downloaded before is taken. Raises BadCheckpoint with the
    way out if the hub says no.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub_errors
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    inside = _inside(subfolder)
    # The transport's own error has changed its home over the library's versions.
    transport: type[Exception] = getattr(hub_errors, "HTTPError", OSError)
    there: list[str] | None = None
    unreachable: Exception | None = None
    try:
        if not constants.HF_HUB_OFFLINE:
            try:
                with _patience(constants.ENDPOINT):
                    found = HfApi(token=token).model_info(
                        name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
                    )
                there = _within([file.rfilename for file in found.siblings or ()], name, inside)
            except (HfHubHTTPError, transport, OSError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if isinstance(status, int) and status < 500 and status != 429:
                    raise
                unreachable = error

        def fetch(names: list[str]) -> Path:
            root = snapshot_download(
                name,
                cache_dir=cache,
                token=token,
                revision=revision,
                allow_patterns=[glob.escape(inside + n) for n in names],
                local_files_only=there is None,
            )
            return Path(root) / inside

        small = [n for n in there or () if any(fnmatch.fnmatchcase(n, p) for p in _SMALL_FILES)]
        small = [n for n in small if "/" not in n or n.startswith(_TEMPLATES)]
        folder = fetch(small)
        config = files.read_object(folder, "config.json") if files.present(folder, "config.json") else {}
        names = files.listed(folder, "*") if there is None else there
        chosen, _ = pick_weights(names, config, lambda index: files.read_object(folder, index))
        if not chosen:
            raise no_weights(folder, names)
        return fetch([*small, *chosen])
    except GatedRepoError as error:
        raise BadCheckpoint(
            f"{name} is gated: accept its license on its page on the hub, then give a token with "
            "--extra_options hf_token=TOKEN, the variable HF_TOKEN, or `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BadCheckpoint(
            f"the hub has no model {name!r} that may be read with this token. Check the spelling; for a folder "
            "on this machine use -i FOLDER; for a private model give a token (HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise BadCheckpoint(
            f"model {name!r} has no revision {revision!r} on the hub. Give a branch, a tag or a commit that its "
            "page lists, or leave it out."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, transport, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise BadCheckpoint(
                f"the hub refuses {name} ({status}): "
                + (
                    "the token that was sent is not valid. Give another one (HF_TOKEN, `hf auth login`), or none "
                    "for public models (--extra_options hf_token=false)."
                    if status == 401
                    else "this token may not read it. A fine-grained token needs the permission for gated "
                    "repositories, and some models wait for their authors to say yes: see the model's page."
                )
            ) from error
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, and it was not downloaded before"
        else:
            reason = (
                " ".join(str(unreachable or error).split()).rstrip(".") or type(unreachable or error).__name__
            )
        raise BadCheckpoint(
            f"{name} is not a folder here, and it could not be downloaded: {reason}. What was downloaded so far "
            "is kept; run the same command again to continue, or give a local folder with -i."
        ) from error


def _inside(subfolder: str | None) -> str:
    """Return the beginning of names in ``subfolder``. Raises BadOption for one that leads out of a repository."""
    if not subfolder:
        return ""
    parts = subfolder.strip("/").split("/")
    if not all(re.fullmatch(r"[\w .+-]{1,255}", part) and part.strip(".") for part in parts):
        raise BadOption(f"--subfolder {shown(subfolder)} is no folder of a repository, such as models/int4.")
    return "/".join(parts) + "/"


def _within(names: list[str], model: str, inside: str) -> list[str]:
    """Return the names that begin with ``inside``, without that. Raises BadCheckpoint if there are none."""
    found = [name.removeprefix(inside) for name in names if name.startswith(inside)]
    if not found:
        folders = sorted({name.rpartition("/")[0] for name in names if "/" in name})
        raise BadCheckpoint(
            f"{model} has no folder {inside.rstrip('/')!r} on the hub"
            + (f"; it has {', '.join(folders[:8])}." if folders else ", and no folders at all.")
        )
    return found


@contextlib.contextmanager
def _patience(address: str) -> Iterator[None]:
    """Say that the hub is waited for if it takes more than a moment."""
    timer = threading.Timer(_MOMENT_SECONDS, _log.warning, [f"waiting for {address} to answer"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
