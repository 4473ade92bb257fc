"""Opening the graphs of an artifact: sessions, and what turns token ids and images into embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from ortlm.artifact import Artifact, Manifest, graph_named
from ortlm.errors import BadArtifact
from ortlm.runtime.engine.session import Provider, Session
from ortlm.runtime.multimodal.addresses import Allow
from ortlm.runtime.multimodal.vision_encoder import Embedder, VisionEncoder


def open_embedder(
    artifact: Artifact, *, threads: int | None = None, providers: Sequence[Provider] | None = None
) -> Embedder | None:
    """Return what makes embeddings of the ids of words for the decoder of ``artifact``; None if that reads ids."""
    if "inputs_embeds" not in graph_named(artifact.manifest, "decoder").inputs:
        return None
    session, encoder = open_embedding(artifact, threads, providers)
    return Embedder(session, graph_named(artifact.manifest, "embedding"), encoder)


def open_embedding(
    artifact: Artifact,
    threads: int | None,
    providers: Sequence[Provider] | None,
    allow_address: Allow | None = None,
) -> tuple[Session, VisionEncoder]:
    """Return what makes embeddings of ids, and what makes features of images."""
    manifest = artifact.manifest
    if manifest.images is None:
        raise BadArtifact(
            f"{artifact.path} needs embeddings as input, and has no graph that makes them of token ids."
        )
    encoder = VisionEncoder(
        manifest.images,
        graph_named(manifest, "vision"),
        lambda: open_session(artifact, "vision", threads, providers),
        allow_address,
        manifest.context_tokens,
    )
    return open_session(artifact, "embedding", threads, providers), encoder


def open_session(
    artifact: Artifact,
    name: str,
    threads: int | None,
    providers: Sequence[Provider] | None,
    manifest: Manifest | None = None,
) -> Session:
    """Load the graph ``name`` as ``manifest`` has it, by default as ``artifact`` does."""
    graph_named(artifact.manifest, name)
    return Session(
        artifact.path / graph_named(manifest or artifact.manifest, name).file,
        threads=threads,
        providers=providers,
        options=artifact.manifest.session_options,
        weights_of=artifact.graph_path(name),
    )
