"""Uploads an artifact to the Hugging Face hub: its files, a model card, and nothing of the machine."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm.artifact.download import CARD_FILE, listed_files, verify
from ortlm.artifact.json_values import read_json
from ortlm.artifact.manifest import GENAI_FILE, MANIFEST_FILE
from ortlm.artifact.reader import open_artifact
from ortlm.errors import BadArtifact, BadOption

_SHORTEST_HOST = 4
_LIMITS = "\n## Limits\n"
_QUALITY = """
## Quality

When it was built it was compared with its checkpoint in fp32 on {tokens:,} tokens of text.

| | |
|---|---|
| Mean KL divergence | {kld:.5f} nats |
| Top-1 agreement | {agreement:.1f} % |
"""


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes to the hub: files of ``folder`` by name, and ``texts`` in place of some; ``left`` stay here.

    ``card`` says nothing of a license or a base model if ``license`` and ``base_model`` are None.
    """

    folder: Path
    name: str
    files: tuple[str, ...]
    texts: Mapping[str, str]
    left: tuple[str, ...]
    bytes: int
    license: str | None
    base_model: str | None


def prepare_upload(folder: str | Path, name: str, *, base_model: str | None = None) -> Upload:
    """Check the artifact in ``folder`` and return what becomes of it on the hub as ``name``.

    ``base_model`` is the hub's name of the model that it was made of, where its card does not say it. Raises
    BadArtifact if a file is not what the build wrote, BadOption for a wrong name, or if a text names this machine.
    """
    check_name(name)
    if base_model is not None:
        check_name(base_model)
    root = open_artifact(folder).path
    if not (root / MANIFEST_FILE).is_file():
        raise BadArtifact(
            f"{root} has no {MANIFEST_FILE}: only what ortlm built is uploaded. Use `hf upload` for others."
        )
    manifest = read_json(root / MANIFEST_FILE)
    listed = listed_files(manifest, root / MANIFEST_FILE)
    verify(root, listed)
    card = _card(root, manifest, name, base_model)
    texts = {MANIFEST_FILE: json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", CARD_FILE: card}
    for file in (MANIFEST_FILE, CARD_FILE, GENAI_FILE):
        text = texts.get(file) or (
            (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
        )
        _check_private(text, root / file)
    names = tuple(sorted({*listed, *texts}))
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return Upload(
        folder=root,
        name=name,
        files=names,
        texts=texts,
        left=tuple(sorted(there - set(names))),
        bytes=sum(entry["bytes"] for file, entry in listed.items() if file not in texts)
        + sum(len(text.encode()) for text in texts.values()),
        license=_stated(card, "license"),
        base_model=_stated(card, "base_model"),
    )


def upload(
    what: Upload, *, public: bool = False, token: str | None = None, message: str | None = None
) -> str:
    """Upload ``what``, into a repository that is private unless ``public``, and return its address.

    Raises BadArtifact, with the way out, if the hub refuses; BadOption if the repository is there and public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(token=token)
    with _explained(what.name):
        try:
            there = api.model_info(what.name)
        except RepositoryNotFoundError:
            there = None
        if there is not None and not there.private and not public:
            raise BadOption(
                f"{what.name} is on the hub already, where everybody can read it. Say --public to upload there, "
                "or choose another name."
            )
        api.create_repo(what.name, private=not public, exist_ok=True, repo_type="model")
        operations = [
            CommitOperationAdd(
                file, what.texts[file].encode() if file in what.texts else str(what.folder / file)
            )
            for file in what.files
        ]
        found = api.create_commit(
            what.name,
            operations,
            commit_message=message or "Upload a model built by ortlm",
            repo_type="model",
        )
    return str(found.commit_url)


def check_name(name: str) -> None:
    """Raise BadOption unless ``name`` can be a model's on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        right = name.count("/") == 1
    except HFValidationError:
        right = False
    if not right:
        raise BadOption(
            f"{shown(name)} cannot be a model's name on the hub: names are USER/NAME, of at most 96 letters, "
            "digits, '-', '_' and '.', as in user/phi-int4."
        )


def _card(root: Path, manifest: Mapping[str, Any], name: str, base_model: str | None) -> str:
    """Return the model card: the build's, with the measured quality, and commands that name the model."""
    path = root / CARD_FILE
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not card.startswith("---\n"):
        raise BadArtifact(f"{path} is not the model card that the build wrote. Build the model again.")
    if base_model is not None:
        stated = _stated(card, "base_model")
        if stated not in (None, base_model):
            raise BadOption(
                f"--base-model {base_model} contradicts {path}, which says {stated}. Leave it out."
            )
        if stated is None:
            card = card.replace(
                "\n---\n", f"\nbase_model: {base_model}\nbase_model_relation: quantized\n---\n", 1
            )
    card = card.replace("ortlm generate FOLDER", f"ortlm generate {name}")
    card = card.replace("ortlm chat FOLDER", f"ortlm chat {name}")
    card = card.replace("'FOLDER'", f"'{name}'")
    check = manifest.get("info", {}).get("check")
    if "\n## Quality\n" not in card and isinstance(check, dict) and isinstance(check.get("kld"), float):
        quality = _QUALITY.format(
            tokens=check.get("scored_tokens", 0), kld=check["kld"], agreement=check.get("same_top", 0.0)
        )
        card = (
            card.replace(_LIMITS, quality + _LIMITS, 1) if _LIMITS in card else card.rstrip() + "\n" + quality
        )
    return card


def _stated(card: str, key: str) -> str | None:
    """Return what the card's front matter says under ``key``."""
    front = card[4:].partition("\n---\n")[0]
    found = re.search(rf"^{key}:[ \t]*(\S.*)$", front, re.MULTILINE)
    return found[1].strip().strip("'\"") if found else None


def _check_private(text: str, path: Path) -> None:
    """Raise BadOption if ``text``, which goes to ``path`` on the hub, names this machine or a place on it."""
    host = socket.gethostname()
    places = {str(Path.home()), str(path.parent.resolve().parent)}
    words = [word for word in places if word.count("/") > 1 or "\\" in word]
    # A plain word may be one of the model's, too.
    if len(host) >= _SHORTEST_HOST and re.search(r"[\d.-]", host):
        words.append(host)
    for word in words:
        if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
            raise BadOption(
                f"{path} names {word}, which is of this machine. Take that out of the file, or build the "
                "model again."
            )


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the hub's library raises into errors of ours."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except (BadOption, BadArtifact):
        raise
    except LocalTokenNotFoundError as error:
        raise _no_token(name) from error
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise _no_token(name) from error
        if status == 403:
            raise BadArtifact(
                f"the hub refuses to write to {name}: this token may not. Give one with write access to "
                f"{name.partition('/')[0]} (HF_TOKEN, or `hf auth login`)."
            ) from error
        said = getattr(error, "server_message", None) if isinstance(error, HfHubHTTPError) else None
        reason = " ".join(str(said or error).split()).rstrip(".")[:300] or type(error).__name__
        raise BadArtifact(
            f"{name} could not be uploaded: {reason}. What the hub has already is not sent again; run the same "
            "command again to continue."
        ) from error


def _no_token(name: str) -> BadArtifact:
    return BadArtifact(
        f"uploading to {name} needs a token with write access that the hub accepts: set HF_TOKEN, or run `hf auth "
        "login`."
    )
