"""The parts of a report: what was compared, on what, where it differs, on which machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ortlm._utils.cpu import physical_cores
from ortlm._version import __version__
from ortlm.artifact import Artifact
from ortlm.evaluation.chunks import Chunks, Text
from ortlm.evaluation.compare import Comparison, WorstToken
from ortlm.evaluation.report import file_hashes
from ortlm.evaluation.statistics import Doubles, finite
from ortlm.runtime.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 32
_BINS_PER_DECADE = 4
_LOWEST, _HIGHEST = -8, 2
_KNOWN = (
    "model_type",
    "precision",
    "target",
    "recipe",
    "bits_per_weight",
    "parameters",
    "built_with",
    "source",
)


def identity(artifact: Artifact) -> dict[str, Any]:
    """Return what an artifact is called, how it was made, and the sizes and hashes of its main files."""
    info = artifact.manifest.info
    files = file_hashes(artifact)
    return {
        "name": artifact.path.resolve().name,
        **{key: info[key] for key in _KNOWN if key in info},
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "files": files,
    }


def text(read: Text, chunks: Chunks) -> dict[str, Any]:
    """Return what was read, and how."""
    prefix = (
        f", after {len(chunks.prefix)} that the tokenizer puts before every text" if chunks.prefix else ""
    )
    return {
        "name": read.name,
        "sha256": read.sha256,
        "characters": sum(len(part) for _, part in read.parts),
        "tokens": chunks.text_tokens,
        "chunk_tokens": chunks.size,
        "chunks": len(chunks.tokens),
        "scored_tokens": chunks.scored,
        "left_out_tokens": chunks.left_out,
        "prefix_tokens": list(chunks.prefix),
        "how": f"The text is cut into chunks of {chunks.size} tokens, each independent{prefix}. The second "
        f"half of each is scored: {chunks.size - 1 - chunks.first} tokens, by both models' predictions after all "
        f"before it. {chunks.left_out:,} of {chunks.text_tokens:,} tokens were left out.",
    }


def histogram(kld: Doubles) -> dict[str, Any]:
    """Return counts of KL divergences between edges that are equally far apart in their logarithms.

    What is below the first edge or above the last counts in the outermost bins.
    """
    steps = (_HIGHEST - _LOWEST) * _BINS_PER_DECADE
    edges = 10.0 ** np.linspace(_LOWEST, _HIGHEST, steps + 1)
    counts, _ = np.histogram(np.clip(kld, edges[0], edges[-1]), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def worst(comparison: Comparison, chunks: Chunks, tokenizer: Tokenizer, read: Text) -> list[dict[str, Any]]:
    """Return the tokens of which the models differ most, with what stood before and what both would say."""
    return [
        {"rank": rank, **_place(place, chunks, tokenizer, read)}
        for rank, place in enumerate(comparison.worst, start=1)
    ]


def _place(place: WorstToken, chunks: Chunks, tokenizer: Tokenizer, read: Text) -> dict[str, Any]:
    ids = chunks.tokens[place.chunk].tolist()

    def written(token: int) -> str:
        return tokenizer.decode([token], skip_special_tokens=False)

    def top(pairs: tuple[tuple[int, float], ...]) -> list[dict[str, Any]]:
        return [{"token": written(token), "id": token, "p": p} for token, p in pairs]

    after = place.at + 1
    return {
        "chunk": place.chunk,
        "position": after,
        "kind": read.parts[int(chunks.kinds[place.chunk][after])][0],
        "kld": place.kld,
        "delta_p": 100 * place.delta_p,
        "context": tokenizer.decode(ids[max(0, after - _CONTEXT_TOKENS) : after], skip_special_tokens=False),
        "next": written(ids[after]),
        "base_top": top(place.base_top),
        "top": top(place.top),
    }


def frontier(artifact: Artifact, size: int, kld: float) -> list[dict[str, Any]]:
    """Return sizes and KL divergences of builds of the model, if the artifact's record has a ``frontier``.

    That is a list of objects with name, bytes and kld; the artifact itself, with ``size`` and ``kld``, is added.
    """
    known = artifact.manifest.info.get("frontier")
    rows = [
        {"name": str(point.get("name", "")), "bytes": int(point["bytes"]), "kld": float(point["kld"])}
        for point in (known if isinstance(known, list) else [])
        if isinstance(point, Mapping) and _is_number(point.get("bytes")) and _is_number(point.get("kld"))
    ]
    if rows:
        rows.append({"name": "this artifact", "bytes": size, "kld": kld})
    return sorted(rows, key=lambda row: (row["bytes"], row["kld"]))


def notes(*, one_by_one: bool, ours: bool) -> list[str]:
    """Return what a reader must know in addition to the figures."""
    texts = [
        "Standard errors treat tokens as independent. Neighbors are not quite, so true errors are larger."
    ]
    if one_by_one:
        texts.append(
            "The graph gives the logits of the last token only, so the artifact was fed token by token: the "
            "figures are those of decode, not of prefill."
        )
    if not ours:
        texts.append("Another tool built this artifact; its own files were left as they are.")
    return texts


def environment(threads: int | None) -> dict[str, Any]:
    """Return versions and machine."""
    return {
        "ortlm": __version__,
        "onnxruntime": _version("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": threads or physical_cores() or os.cpu_count(),
    }


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _processor() -> str | None:
    if sys.platform.startswith("linux"):
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and finite(value) is not None
