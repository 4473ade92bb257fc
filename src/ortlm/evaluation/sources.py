"""Where logits come from: an artifact, or a checkpoint in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ortlm.artifact import GENAI_FILE, MANIFEST_FILE, Artifact, graph_named, open_artifact
from ortlm.artifact.provenance import Origin, recall
from ortlm.dtypes import Floats
from ortlm.errors import BadOption
from ortlm.evaluation.types import Source, Tokens
from ortlm.layerwise.types import Observe
from ortlm.runtime.engine.devices import DeviceRequest
from ortlm.runtime.language_model import LanguageModel


class ArtifactSource:
    """An artifact, of ortlm or of another builder, as a Source."""

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        device: DeviceRequest | str | None = None,
        *,
        session_options: Mapping[str, object] | None = None,
    ) -> None:
        artifact = open_artifact(path)
        options = {**artifact.manifest.session_options, **(session_options or {})}
        self.artifact = replace(artifact, manifest=replace(artifact.manifest, session_options=options))
        self.lm = LanguageModel(self.artifact, threads=threads, device=device, prefix_caches=0)
        graph = graph_named(self.artifact.manifest, "decoder")
        info = self.lm.session.outputs[graph.outputs["logits"]]
        # Of such a graph the decode loop asks one token after the other.
        self.one_by_one = info.shape[1] == 1 and "logits_to_keep" not in graph.optional
        self._threads = threads
        self._chunks: list[list[int]] = []

    @property
    def vocab_size(self) -> int:
        """How many logits there are, V."""
        return self.lm.vocab_size

    def open(self, chunks: Sequence[Tokens], observe: Observe | None = None) -> None:
        """Take the chunks; ``observe`` is called for the first two only."""
        self._chunks = [chunk.tolist() for chunk in chunks]
        if observe is not None:
            from ortlm.evaluation.layers import observe_artifact

            observe_artifact(
                self.artifact, self._chunks[:2], observe, threads=self._threads, device=self.lm.device
            )

    def logits(self, chunk: int) -> Floats:
        """Return the logits after every token of a chunk, [S, V].

        A graph that gives those of the last token only is fed token by token, which is slow.
        """
        # What is asked about is the weights that answers are generated with.
        return self.lm.logits(self._chunks[chunk], as_answers=True)


def is_artifact(path: str | Path) -> bool:
    """Return whether ``path`` is a folder with an artifact, as far as its files' names tell."""
    return any((Path(path) / name).is_file() for name in (MANIFEST_FILE, GENAI_FILE))


def find_reference(artifact: Artifact) -> Origin:
    """Return what ``artifact`` was built from: on this machine, or by its name on the hub.

    Raises BadOption if that is not known, or if the build added something that it has not.
    """
    known_here = recall(artifact.manifest)
    if known_here is not None:
        return known_here
    info = artifact.manifest.info
    source, merged = str(info.get("source") or ""), info.get("merged_adapter")
    if merged:
        raise BadOption(
            f"{artifact.path} holds the merged adapter {merged}, which its source {source} has not. Say with "
            "--reference what to compare with: an fp32 build with the same adapter, for example."
        )
    if "/" not in source:
        known = (
            f"was built from a local folder, {source}" if source else "does not say what it was built from"
        )
        raise BadOption(
            f"{artifact.path} {known}. Say with --reference what to compare with: the checkpoint's folder or "
            "name, or another artifact such as an fp32 build."
        )
    return Origin(source)


def open_checkpoint(origin: Origin, *, threads: int | None = None) -> Source:
    """Return a checkpoint, with the adapters that became part of it, as a Source in float."""
    # It needs onnx-ir, which takes most of a second to import.
    from ortlm.layerwise.reference import open_reference

    return open_reference(origin.source, adapters=origin.adapters, threads=threads)
