"""What an evaluation found: one JSON object, and where it is written."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ortlm._utils.hashing import sha256_of
from ortlm._utils.whole_files import write_whole
from ortlm.artifact import MANIFEST_FILE, REPORT_FILE, Artifact, open_artifact
from ortlm.evaluation.html import page
from ortlm.evaluation.model_card import quality_section, with_section
from ortlm.evaluation.statistics import Statistics

SCHEMA = 1
HTML_FILE, JSON_FILE = "report.html", REPORT_FILE
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
        data, figures = self.data, self.statistics.to_dict()
        return {
            "schema": SCHEMA,
            "created": data["created"],
            "reference": data["reference"]["name"],
            "text": data["text"]["name"],
            "text_sha256": data["text"]["sha256"],
            "chunk_tokens": data["text"]["chunk_tokens"],
            "scored_tokens": figures["scored_tokens"],
            "mean_kld": figures["kld"]["value"],
            "mean_kld_standard_error": figures["kld"]["standard_error"],
            "median_kld": figures["kld_percentiles"]["median"],
            "p99_kld": figures["kld_percentiles"]["p99"],
            "maximum_kld": figures["kld_percentiles"]["maximum"],
            "same_top_percent": figures["same_top"]["value"],
            "same_top_percent_standard_error": figures["same_top"]["standard_error"],
            "delta_p_rms_percent": figures["delta_p_rms"]["value"],
            "delta_p_rms_percent_standard_error": figures["delta_p_rms"]["standard_error"],
            "ppl": figures["ppl"]["value"],
            "base_ppl": figures["base_ppl"]["value"],
            "ppl_ratio": figures["ppl_ratio"]["value"],
            "ppl_ratio_standard_error": figures["ppl_ratio"]["standard_error"],
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
        listed = listed_files(artifact)
        if card.is_file():
            before = card.read_text(encoding="utf-8")
            texts[_CARD] = with_section(before, quality_section(self.data))
        listed |= {name: _entry(text) for name, text in texts.items()}
        info = {**artifact.manifest.info, "quality": self.headline(), "files": dict(sorted(listed.items()))}
        contents = {artifact.path / MANIFEST_FILE: replace(artifact.manifest, info=info).to_json()}
        if _CARD in texts:
            contents[card] = texts[_CARD]
        return contents


def is_ours(artifact: Path) -> bool:
    """Return whether ortlm built what is in the folder ``artifact``."""
    return (artifact / MANIFEST_FILE).is_file()


def listed_files(artifact: Artifact) -> dict[str, Any]:
    """Return what the manifest says of files, by name; anybody may have written it."""
    files = artifact.manifest.info.get("files")
    return dict(files) if isinstance(files, Mapping) else {}


def file_hashes(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of graph, weights and tokenizer of ``artifact``, by file name."""
    graph = artifact.graph_path("decoder")
    # Weights lie next to the graph, under its name or another that is told by their ending.
    paths = {graph, artifact.path / "tokenizer.json"}
    paths |= {*graph.parent.glob("*.data"), *graph.parent.glob(f"{glob.escape(graph.name)}_data*")}
    recorded = listed_files(artifact)
    entries = {}
    for path in sorted(path for path in paths if path.is_file()):
        name = path.relative_to(artifact.path).as_posix()
        size = path.stat().st_size
        entry = recorded.get(name)
        if isinstance(entry, dict) and entry.get("bytes") == size and entry.get("sha256"):
            # Reading many gigabytes once more would only tell what the build has told.
            entries[name] = {"bytes": size, "sha256": entry["sha256"]}
        else:
            entries[name] = {"bytes": size, "sha256": sha256_of(path)}
    return entries


def _entry(text: str) -> dict[str, Any]:
    data = text.encode()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
