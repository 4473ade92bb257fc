"""What an evaluation found: one JSON object, and where it is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ortlm._utils.hashing import sha256_of
from ortlm._utils.whole_files import write_whole
from ortlm.artifact import MANIFEST_FILE, Artifact, open_artifact
from ortlm.evaluation.html import page
from ortlm.evaluation.model_card import quality_section, with_section
from ortlm.evaluation.statistics import Statistics

SCHEMA = 1
HTML_FILE, JSON_FILE = "report.html", "report.json"
_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation. ``data`` is what report.json holds; ``statistics`` are its main figures."""

    artifact: Path
    statistics: Statistics
    data: Mapping[str, Any]

    def to_json(self) -> str:
        """Return the text of report.json."""
        return json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """Return the text of report.html: one file that needs nothing else."""
        return page(self.data)

    def headline(self) -> dict[str, Any]:
        """Return the few figures that go into ``ortlm.json`` and the model card."""
        data, found = self.data, self.statistics.to_dict()
        return {
            "schema": SCHEMA,
            "created": data["created"],
            "reference": data["reference"]["name"],
            "text": data["text"]["name"],
            "text_sha256": data["text"]["sha256"],
            "chunk_tokens": data["text"]["chunk_tokens"],
            "scored_tokens": found["scored_tokens"],
            "mean_kld": found["kld"]["value"],
            "mean_kld_standard_error": found["kld"]["standard_error"],
            "median_kld": found["kld_percentiles"]["median"],
            "p99_kld": found["kld_percentiles"]["p99"],
            "maximum_kld": found["kld_percentiles"]["maximum"],
            "same_top_percent": found["same_top"]["value"],
            "same_top_percent_standard_error": found["same_top"]["standard_error"],
            "delta_p_rms_percent": found["delta_p_rms"]["value"],
            "delta_p_rms_percent_standard_error": found["delta_p_rms"]["standard_error"],
            "ppl": found["ppl"]["value"],
            "base_ppl": found["base_ppl"]["value"],
            "ppl_ratio": found["ppl_ratio"]["value"],
            "ppl_ratio_standard_error": found["ppl_ratio"]["standard_error"],
        }

    def write(self, folder: str | Path | None = None) -> list[Path]:
        """Write report.html and report.json into ``folder``, by default the artifact's; return what was written.

        The headline figures go into the artifact's model card and ``ortlm.json``, if ortlm built it and they may
        be written: nothing of another builder's is changed. All files appear, or none, whole.
        """
        target = self.artifact if folder is None else Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        texts = {HTML_FILE: self.to_html(), JSON_FILE: self.to_json()}
        files = {target / name: text for name, text in texts.items()}
        if is_ours(self.artifact) and os.access(self.artifact, os.W_OK):
            inside = target.resolve()
            added = {}
            if inside.is_relative_to(self.artifact.resolve()):
                at = inside.relative_to(self.artifact.resolve())
                added = {(at / name).as_posix(): text for name, text in texts.items()}
            # The list of files first: a file that is on no list would keep the artifact from being replaced.
            files = {**self._recorded(added), **files}
        # As bytes, since sizes and hashes are recorded: no system may change line ends.
        write_whole({path: text.encode() for path, text in files.items()})
        return list(files)

    def _recorded(self, added: Mapping[str, str]) -> dict[Path, str]:
        """Return the manifest and the model card with this report's headline, by path.

        The manifest lists the files ``added`` with their sizes and hashes.
        """
        artifact = open_artifact(self.artifact)
        card = artifact.path / _CARD
        texts = dict(added)
        listed: dict[str, Any] = dict(artifact.manifest.info.get("files") or {})
        if card.is_file():
            before = card.read_text(encoding="utf-8")
            texts[_CARD] = with_section(before, quality_section(self.data))
        listed |= {name: _entry(text) for name, text in texts.items()}
        info = {**artifact.manifest.info, "quality": self.headline(), "files": dict(sorted(listed.items()))}
        found = {artifact.path / MANIFEST_FILE: replace(artifact.manifest, info=info).to_json()}
        if _CARD in texts:
            found[card] = texts[_CARD]
        return found


def is_ours(artifact: Path) -> bool:
    """Return whether ortlm built what is in the folder ``artifact``."""
    return (artifact / MANIFEST_FILE).is_file()


def file_hashes(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of graph, weights and tokenizer of ``artifact``, by file name."""
    graph = artifact.graph_path("decoder")
    # Weights lie beside the graph, under its name or another that is told by their ending.
    paths = {graph, artifact.path / "tokenizer.json"}
    paths |= set(graph.parent.glob("*.data"))
    recorded = artifact.manifest.info.get("files") or {}
    found = {}
    for path in sorted(path for path in paths if path.is_file()):
        name = path.relative_to(artifact.path).as_posix()
        size = path.stat().st_size
        entry = recorded.get(name) if isinstance(recorded, dict) else None
        if isinstance(entry, dict) and entry.get("bytes") == size and entry.get("sha256"):
            # Reading many gigabytes once more would only tell what the build has told.
            found[name] = {"bytes": size, "sha256": entry["sha256"]}
        else:
            found[name] = {"bytes": size, "sha256": sha256_of(path)}
    return found


def _entry(text: str) -> dict[str, Any]:
    data = text.encode()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
