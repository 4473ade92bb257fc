"""An evaluation, top to bottom: find the reference, read the text, measure, compare, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ortlm._utils.progress import NullProgress, Progress
from ortlm.artifact import Artifact, open_artifact
from ortlm.artifact.provenance import Origin, public_name
from ortlm.errors import BadOption
from ortlm.evaluation import details
from ortlm.evaluation.chunks import Chunks, chunk_size, make_chunks, read_text
from ortlm.evaluation.cluster import check_cluster, compare_on
from ortlm.evaluation.compare import Comparison, compare
from ortlm.evaluation.domains import domains
from ortlm.evaluation.drift import drift as answer_prompts
from ortlm.evaluation.drift import summarize
from ortlm.evaluation.report import SCHEMA, Report, is_ours
from ortlm.evaluation.sources import ArtifactSource, find_reference, is_artifact, open_checkpoint
from ortlm.evaluation.speed import measure
from ortlm.evaluation.statistics import statistics
from ortlm.evaluation.types import Source
from ortlm.runtime.engine.devices import DeviceRequest
from ortlm.runtime.text.tokenizer import Tokenizer


def evaluate(
    artifact: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    chunk: int | None = None,
    tokens: int | None = None,
    layers: bool = False,
    drift: bool = False,
    speed: bool = True,
    threads: int | None = None,
    device: str | None = None,
    device_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    ray: str | None = None,
) -> Report:
    """Compare ``artifact`` with its reference on a text, and return what was found; nothing is written.

    ``reference`` is another artifact, or a checkpoint's folder or name on the hub, by default that which the
    artifact was built from. ``text`` is a file, by default the project's own corpus, of which at most ``tokens``
    tokens are read in chunks of ``chunk`` (512, or the context if that is smaller). ``layers`` measures the noise
    in each layer, ``drift`` compares answers to prompts, ``speed`` times the artifact. ``device`` runs
    both, by default each what it was built for; ``device_options`` as for ``ortlm.load``. ``ray`` is the address
    of a cluster whose CPUs read the chunks; it goes with neither ``layers`` nor ``drift``.
    Raises BadOption, BadArtifact and BadCheckpoint.
    """
    built = open_artifact(artifact)
    base = Origin(str(reference)) if reference is not None else find_reference(built)
    base_artifact = open_artifact(base.source) if is_artifact(base.source) else None
    tokenizer = Tokenizer.open(built.path)
    _check_same(built, base_artifact, tokenizer)
    read = read_text(text)
    context = min(a.manifest.context_tokens for a in (built, base_artifact) if a is not None)
    chunks = make_chunks(read, tokenizer, size=chunk_size(chunk, context), tokens=tokens)
    where = DeviceRequest(device, device_options or {})
    if ray is not None:
        check_cluster(base, layers=layers, drift=drift, device=device)
    pair = _Pair(built, base_artifact, base, chunks, threads, where, progress or NullProgress(), ray)
    # Before anything is loaded here, so that it has the machine for itself.
    timed = pair.speeds() if speed else None
    run = pair.run(layers=layers, drift=drift)
    figures = statistics(run.comparison.scores)
    identity = details.identity(built)
    data = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "artifact": identity,
        "reference": {
            "kind": "checkpoint",
            # Where the hub's files lie is called by a commit.
            "name": public_name(str(reference or built.manifest.info.get("source") or base.source)),
            **({} if base_artifact is None else {"kind": "artifact", **details.identity(base_artifact)}),
        },
        "text": details.text(read, chunks),
        "statistics": figures.to_dict(),
        "kinds": domains(read, run.comparison),
        "histogram": details.histogram(run.comparison.scores.kld),
        "worst": details.worst(run.comparison, chunks, tokenizer, read),
        "layers": run.layers,
        "drift": run.drift,
        "speed": timed,
        "frontier": details.frontier(built, identity["bytes"], figures.kld.value),
        "notes": details.notes(one_by_one=run.one_by_one, ours=is_ours(built.path)),
        "environment": details.environment(threads),
    }
    return Report(built.path, figures, data)


@dataclass(frozen=True, slots=True)
class _Run:
    """What came of running both models."""

    comparison: Comparison
    layers: dict[str, Any] | None
    drift: dict[str, Any] | None
    one_by_one: bool


@dataclass(frozen=True, slots=True)
class _Pair:
    """An artifact and its reference (``base_artifact``, or the checkpoint ``base``), and what both will read."""

    built: Artifact
    base_artifact: Artifact | None
    base: Origin
    chunks: Chunks
    threads: int | None
    where: DeviceRequest
    progress: Progress
    ray: str | None = None

    def speeds(self) -> dict[str, Any]:
        """Return the speed of the artifact, and of the reference if that is one too."""
        prompt = self.chunks.tokens[0].tolist()

        def timed(artifact: Artifact) -> dict[str, Any]:
            self.progress.start(f"measuring the speed of {artifact.path.name}", 0, "runs")
            context = artifact.manifest.context_tokens
            return measure(
                artifact.path,
                prompt,
                context=context,
                threads=self.threads,
                device=self.where.name,
                device_options=self.where.options,
            )

        base = self.base_artifact
        return {"artifact": timed(self.built), "reference": None if base is None else timed(base)}

    def run(self, *, layers: bool, drift: bool) -> _Run:
        """Compare logits, layers and answers."""
        if self.ray is not None:
            self.progress.start("comparing on the cluster", len(self.chunks.tokens), "chunks")
            found = compare_on(
                self.ray,
                self.built.path,
                Path(self.base.source if self.base_artifact is None else self.base_artifact.path),
                self.chunks,
                threads=self.threads,
                advance=self.progress.advance,
            )
            return _Run(found.comparison, None, None, found.one_by_one)
        noise = None
        if layers:
            # It needs onnx-ir, which takes most of a second to import.
            from ortlm.evaluation.layers import LayerNoise

            noise = LayerNoise()
        tokens, total = self.chunks.tokens, len(self.chunks.tokens)
        self.progress.start("reading with the reference", 0, "chunks")
        reference = self._reference()
        # First: while it streams its layers, the artifact need not be in memory.
        reference.open(tokens, noise.reference if noise is not None else None)
        self.progress.start("loading the artifact", 0, "models")
        model = ArtifactSource(self.built.path, self.threads, self.where)
        model.open(tokens, noise.model if noise is not None else None)
        self.progress.start("comparing", total, "chunks")
        comparison = compare(model, reference, self.chunks, self.progress.advance)
        answers = None
        if drift:
            self.progress.start("answering prompts", 0, "rounds")
            answers = summarize(answer_prompts(model.lm, model, reference, self.progress.advance), model.lm)
        snr = None if noise is None else {"unit": "dB", "chunks": min(2, total), "snr": noise.decibels()}
        return _Run(comparison, snr, answers, model.one_by_one)

    def _reference(self) -> Source:
        if self.base_artifact is None:
            return open_checkpoint(self.base, threads=self.threads)
        return ArtifactSource(self.base_artifact.path, self.threads, self.where)


def _check_same(built: Artifact, base: Artifact | None, tokenizer: Tokenizer) -> None:
    """Raise BadOption if ``base`` reads other tokens than ``built``."""
    if base is not None and not tokenizer.same_as(Tokenizer.open(base.path)):
        raise BadOption(
            f"{built.path} and {base.path} have different tokenizers, so their probabilities cannot be compared. "
            "Give an artifact of the same model as --reference."
        )
