"""What the page shows of a model: what it can do, how it was built, and how good it was found to be."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ortlm._utils.checked_json import read_object
from ortlm.artifact import REPORT_FILE, Artifact
from ortlm.errors import BadArtifact
from ortlm.runtime.language_model import LanguageModel
from ortlm.runtime.prompts import Prompts

# Fields of a request that the publisher may recommend values for.
_PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FACTS = (
    "source", "model_type", "parameters", "precision", "recipe", "bits_per_weight", "output_bytes",
    "checkpoint_bytes", "cache_bytes_per_token", "kv_cache", "activations", "target", "built_with",
)  # fmt: skip
# Of report.json; the rest is what it takes to repeat the measurement, and long.
_REPORTED = ("created", "artifact", "reference", "text", "statistics", "kinds", "layers", "speed", "notes")
_MOST_REPORT_BYTES = 64 << 20
# Lists of files with their hashes.
_LONG = ("files", "how")


def facts(artifact: Artifact, reader: LanguageModel | Prompts) -> dict[str, Any]:
    """Return what the model in ``artifact`` can do, for the page to offer it; ``reader`` has its tokenizer.

    ``vocabulary`` is the same for models that read the same token ids; None without a tokenizer.
    """
    manifest, template, vocabulary = artifact.manifest, None, None
    # A model without a tokenizer, or one whose folder is gone, is still there.
    with contextlib.suppress(BadArtifact):
        vocabulary, template = reader.tokenizer.fingerprint, reader.chat_template
    source = "" if template is None else "".join(template.templates.values())
    return {
        "chat": template is not None,
        "images": manifest.images is not None,
        "reasoning": "<think>" in source,
        "vocabulary": vocabulary,
        "defaults": {name: manifest.generation.get(name) for name in _PARAMETERS},
        "about": {name: value for name in _FACTS if _is_plain(value := manifest.info.get(name))},
    }


def quality(artifact: Artifact) -> dict[str, Any]:
    """Return what was measured of the model in ``artifact``: each part None if it is not there.

    ``report`` is what `ortlm evaluate` wrote next to the model, without what is long; ``summary`` is the headline
    that it left in the manifest, and ``check`` the short check at the end of the build.
    """
    info, report = artifact.manifest.info, None
    path = artifact.path / REPORT_FILE
    if path.is_file():
        try:
            found = read_object(path, limit=_MOST_REPORT_BYTES, error=BadArtifact)
        except BadArtifact:
            # Anybody may have written it; the page says that there is none.
            found = {}
        if "statistics" in found:
            report = {name: _short(found.get(name)) for name in _REPORTED}
    return {"summary": _object(info.get("quality")), "check": _object(info.get("check")), "report": report}


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _object(found: object) -> dict[str, Any] | None:
    return dict(found) if isinstance(found, Mapping) else None


def _short(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: value for key, value in found.items() if key not in _LONG}
    return found
