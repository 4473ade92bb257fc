"""A quick look at a model that was just built: numbers, how far from the reference, and a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ortlm.artifact import Artifact, open_artifact
from ortlm.dtypes import Floats
from ortlm.evaluation.chunks import Chunks, Text, make_chunks, read_text
from ortlm.evaluation.compare import compare
from ortlm.evaluation.in_parts import PartsSource
from ortlm.evaluation.sources import ArtifactSource
from ortlm.evaluation.statistics import statistics
from ortlm.evaluation.types import Source, Tokens
from ortlm.layerwise.types import Observe
from ortlm.runtime.engine.huge_pages import give_back_freed_memory
from ortlm.runtime.text.tokenizer import Tokenizer

_CHUNKS = 2
_PROMPT = "The first thing to know about a river is"


@dataclass(frozen=True, slots=True)
class Check:
    """What a quick look found.

    ``finite`` says whether all logits are numbers. ``kld`` (mean, nats) and ``same_top`` (percent) are None
    without a reference, and where the logits are not finite. ``continuation`` is what the model says after
    ``prompt``, empty if the model was not in memory as a whole.
    """

    finite: bool
    scored_tokens: int
    kld: float | None
    same_top: float | None
    prompt: str
    continuation: str

    def to_dict(self) -> dict[str, Any]:
        """Return all fields under their names."""
        return asdict(self)


def quick_check(
    artifact: Path,
    reference: Source | None = None,
    *,
    tokens: int = 256,
    threads: int | None = None,
    prompt: str = _PROMPT,
    new_tokens: int = 24,
    in_parts: bool = False,
) -> Check:
    """Return whether ``artifact`` gives numbers, how far they are from those of ``reference``, and a sample.

    Both read ``tokens`` tokens of the project's own corpus, in two chunks of which the second half is scored: the
    reference first, so that the two are not in memory together. With ``in_parts`` the artifact never is in memory
    as a whole, and there is no continuation; BadOption if it cannot be cut, as those of vision models.
    """
    opened = open_artifact(artifact)
    chunks = _chunks(opened, tokens)
    # On the processor whatever it was built for: no other device is needed for a look.
    parts = PartsSource(opened, threads) if in_parts else None
    base = None if reference is None else _Answers(reference, chunks)
    if parts is None:
        # One weight after the other is brought into the kernels' layout, which takes longer, and less memory.
        options = {"session.prepack.enable_parallel": "0"}
        whole = ArtifactSource(artifact, threads, "cpu", session_options=options)
    source = _Watched(parts or whole)
    source.open(chunks.tokens)
    kld = same_top = None
    if base is None:
        for number in range(_CHUNKS):
            source.logits(number)
    else:
        figures = statistics(compare(source, base, chunks).scores)
        if source.finite:
            kld, same_top = figures.kld.value, figures.same_top.value
    made = ""
    if source.finite and parts is None:
        made = whole.lm.generate(prompt, max_new_tokens=new_tokens, temperature=0, reuse_cache=False).text
    return Check(source.finite, chunks.scored, kld, same_top, prompt, made)


def _chunks(artifact: Artifact, tokens: int) -> Chunks:
    """Return two chunks of the corpus, far from each other, so that they are of different kinds."""
    corpus = read_text(None)
    size = min(max(8, tokens // _CHUNKS), artifact.manifest.context_tokens)
    chunks = make_chunks(Text(corpus.name, corpus.parts), Tokenizer.open(artifact.tokenizer_path), size=size)
    apart = len(chunks.tokens) // _CHUNKS
    picked = slice(0, apart * _CHUNKS, apart)
    return replace(chunks, tokens=chunks.tokens[picked], kinds=chunks.kinds[picked])


class _Answers:
    """The logits that a Source gives of ``chunks``, kept."""

    def __init__(self, inner: Source, chunks: Chunks) -> None:
        self.vocab_size = inner.vocab_size
        inner.open(chunks.tokens)
        self._logits = [inner.logits(number) for number in range(len(chunks.tokens))]
        give_back_freed_memory()

    def open(self, chunks: Sequence[Tokens], observe: Observe | None = None) -> None:
        raise NotImplementedError("the chunks are those that were given at the beginning.")

    def logits(self, chunk: int) -> Floats:
        return self._logits[chunk]


class _Watched:
    """A Source that notes whether its logits are numbers, and hands on zeros in place of others."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner
        self.finite = True

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def open(self, chunks: Sequence[Tokens], observe: Observe | None = None) -> None:
        self.inner.open(chunks, observe)

    def logits(self, chunk: int) -> Floats:
        logits = self.inner.logits(chunk)
        if np.isfinite(logits).all():
            return logits
        self.finite = False
        return np.nan_to_num(logits, posinf=0.0, neginf=0.0)
