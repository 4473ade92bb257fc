"""Opening the graphs of an artifact: sessions, and what turns token ids and images into embeddings."""

from __future__ import annotations

from collections.abc import Callable

from ortlm._utils.cpu import INTEGERS_DO_NOT_OVERFLOW, integers_overflow
from ortlm.artifact import Artifact, Manifest, graph_named
from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.engine.constant_inputs import with_constant_defaults
from ortlm.runtime.engine.devices import CPU, Device, DeviceRequest, choose_device
from ortlm.runtime.engine.session import Session
from ortlm.runtime.multimodal.addresses import Allow
from ortlm.runtime.multimodal.vision_encoder import Embedder, VisionEncoder

# Options that say how the graph is to be read: where the second of its rotation tables begins.
_OF_THE_GRAPH = frozenset({"multiRotaryCacheConcatOffset"})


def device_for(artifact: Artifact, request: DeviceRequest | str | None = None) -> Device:
    """Return the device to run ``artifact`` on, by default the one that it was built for.

    Raises BadOption for a device or an option that does not exist, and for a device that would read the graph in
    another way than it was built; NoDevice if this machine lacks the device.
    """
    manifest = artifact.manifest
    device = choose_device(
        request, built_for=manifest.device, built_options=manifest.device_options, folder=artifact.path
    )
    for key in sorted(_OF_THE_GRAPH & manifest.device_options.keys() - device.options.keys()):
        raise BadOption(
            f"{artifact.path} was built for {manifest.device}, whose option {key} is a part of its graph: on "
            f"{device.name} the output would be wrong. Run it on {manifest.device}, or build it for {device.name}."
        )
    return device


def open_embedder(artifact: Artifact, *, threads: int | None = None, device: Device = CPU) -> Embedder | None:
    """Return what makes embeddings of the ids of words for the decoder of ``artifact``; None if that reads ids."""
    if "inputs_embeds" not in graph_named(artifact.manifest, "decoder").inputs:
        return None
    session, encoder = open_embedding(artifact, threads, device)
    return Embedder(session, graph_named(artifact.manifest, "embedding"), encoder)


def open_embedding(
    artifact: Artifact,
    threads: int | None,
    device: Device,
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
        lambda: open_session(artifact, "vision", threads, device),
        allow_address,
        manifest.context_tokens,
    )
    return open_session(artifact, "embedding", threads, device), encoder


def _check_integers(artifact: Artifact, device: Device) -> None:
    """Raise BadArtifact for integer matmuls that would overflow on this processor, and not say so."""
    manifest = artifact.manifest
    told = manifest.session_options.get(INTEGERS_DO_NOT_OVERFLOW)
    if manifest.prompt_tokens is None or int(told or 0) == 1:
        return
    if device.is_cpu and integers_overflow():
        raise BadArtifact(
            f"{artifact.path} was built with --fast-prompts and without {INTEGERS_DO_NOT_OVERFLOW}=1: on this "
            "processor, which has no VNNI, prompts would be computed wrongly. Build it again."
        )


def open_session(
    artifact: Artifact,
    name: str,
    threads: int | None,
    device: Device,
    manifest: Manifest | None = None,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> Session:
    """Load the graph ``name`` as ``manifest`` has it, by default as ``artifact`` does.

    ``meanwhile`` is as for Session.
    """
    graph_named(artifact.manifest, name)
    _check_integers(artifact, device)
    graph = graph_named(manifest or artifact.manifest, name)
    path = artifact.path / graph.file
    return Session(
        path,
        threads=threads,
        device=device,
        options=artifact.manifest.session_options,
        model=with_constant_defaults(path) if device.constant_defaults else None,
        weights_of=artifact.graph_path(name),
        # What a captured run writes has to stay where it is.
        capture=bool(graph.states) and all(state.kind == "grow" for state in graph.states),
        meanwhile=meanwhile,
    )
