"""What a checkpoint really holds: its tensors by the names of the model's spec, whatever its files call them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from ortlm.architectures import describe
from ortlm.checkpoint.files import shown
from ortlm.checkpoint.quantized_weight import QuantizedWeight
from ortlm.checkpoint.reader import Checkpoint, check_weights
from ortlm.checkpoint.safetensors import same
from ortlm.errors import BadCheckpoint, UnsupportedModel
from ortlm.spec import Architecture, Source


def stored_architecture(checkpoint: Checkpoint, adapters: Container[str] = ()) -> Architecture:
    """Return what the model of ``checkpoint`` is, by its configuration and by the tensors that are there.

    It has images that need an adapter if that is one of ``adapters``, which are names.

    Raises UnsupportedModel, and BadCheckpoint if tensors are missing, too many, or of other shapes.
    """
    try:
        architecture = described(checkpoint.config, adapters)
        architecture = _renamed(checkpoint, _by_part(checkpoint, architecture))
        architecture = _own_head(checkpoint, architecture)
        _check_head(checkpoint, architecture)
        _check_tensors(checkpoint, architecture)
    except (BadCheckpoint, UnsupportedModel) as error:
        if checkpoint.file is None:
            raise
        # There is no config.json that could be looked at.
        reason = str(error).removeprefix("config.json: ")
        raise type(error)(f"{shown(checkpoint.file)}, its metadata read as config.json: {reason}") from error
    return architecture


def described(config: Mapping[str, Any], adapters: Container[str]) -> Architecture:
    """Return the architecture of ``config``, with images that need one of ``adapters``."""
    architecture = describe(config)
    seeing = architecture.seeing
    if seeing is not None and seeing.vision is not None and seeing.vision.adapter in adapters:
        return seeing
    return architecture


def _by_part(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """Return ``architecture`` with those weights that a GGUF file holds by the names of the spec.

    What all experts of a layer have lies in one tensor there, and a row may lie there as a vector.
    """
    if checkpoint.file is None:
        return architecture
    sources = dict(architecture.sources)
    for parameter in architecture.parameters:
        tensor = replace(parameter, expert=None).name
        weight = checkpoint.weights.get(tensor)
        if weight is not None:
            row = parameter.shape == (1, *weight.shape)
            sources[parameter.name] = Source(
                tensor, index=parameter.expert, stored=weight.shape if row else None
            )
    return replace(architecture, sources=sources)


def _renamed(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """Return ``architecture`` with the names of tensors that this checkpoint has under other ones."""
    if not architecture.renamed and not architecture.others:
        return architecture

    def actual(tensor: str) -> str:
        for usual, other in architecture.renamed:
            moved = other + tensor.removeprefix(usual)
            if tensor.startswith(usual) and moved in checkpoint.weights:
                return moved
        return tensor

    def found(source: Source) -> Source:
        here = source.tensor in checkpoint.weights
        if here:
            return source
        return replace(source, tensor=actual(source.tensor), below=tuple(map(actual, source.below)))

    sources = {name: found(source) for name, source in architecture.sources.items()}
    for name, other in architecture.others.items():
        if sources[name].tensor not in checkpoint.weights:
            other = found(other)
            if other.tensor in checkpoint.weights:
                sources[name] = other
    copy = architecture.head_copy
    copy = copy if copy in checkpoint.weights else actual(copy)
    ignored = [
        pattern.replace(usual, other, 1)
        for pattern in architecture.ignored
        for usual, other in architecture.renamed
        if pattern.startswith(usual)
    ]
    return replace(architecture, sources=sources, head_copy=copy, ignored=(*architecture.ignored, *ignored))


def _check_head(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise BadCheckpoint if an untied model has everything but its head, as the class without one saves it."""
    head = architecture.sources.get("head.weight")
    if head is None or head.tensor in checkpoint.weights:
        return
    if all(
        s.tensor in checkpoint.weights for n, s in architecture.sources.items() if not n.startswith("head.")
    ):
        raise BadCheckpoint(
            f"weight {head.tensor!r} is missing from {checkpoint.path}, and config.json does not say that head "
            "and embeddings are tied: the model was saved from a class without a head, so that it cannot write. "
            "Use the checkpoint of the causal model, or, if its embeddings are its head, set "
            '"tie_word_embeddings": true in config.json.'
        )


def _check_tensors(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Compare the checkpoint's tensors, names and shapes, with what the spec implies."""
    expected: dict[str, tuple[int, ...]] = {}
    for parameter in architecture.parameters:
        source = architecture.sources[parameter.name]
        shape = parameter.shape if source.stored is None else source.stored
        ranges = source.pieces if source.rows is None else (source.rows,)
        if ranges:
            shape = (max(stop for _, stop in ranges), *shape[1:])
        if source.transposed:
            shape = shape[::-1]
        if source.index is not None:
            shape = (source.index + 1, *shape)
        if source.below:
            shape = (shape[0] // (1 + len(source.below)), *shape[1:])
        for tensor in (source.tensor, *source.below):
            # Several weights may lie in one tensor.
            expected[tensor] = tuple(map(max, shape, expected.get(tensor, shape)))
    copies = (architecture.head_copy,) if architecture.decoder.tied_head else ()
    check_weights(checkpoint, expected, (*architecture.ignored, *copies, *_idle_biases(checkpoint, expected)))


def _idle_biases(checkpoint: Checkpoint, expected: Mapping[str, object]) -> list[str]:
    """Return biases of quantized matrices that are all zero: old quantizers save one for each matrix."""
    found = []
    for name, weight in checkpoint.weights.items():
        matrix = checkpoint.weights.get(f"{name.removesuffix('.bias')}.weight")
        idle = name.endswith(".bias") and name not in expected and isinstance(matrix, QuantizedWeight)
        if idle and len(weight.shape) == 1 and not weight.rows(0, weight.shape[0]).any():
            found.append(name)
    return found


def _own_head(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """Return ``architecture`` untied if the checkpoint, though tied by its configuration, holds another head.

    Fine-tunes leave such heads behind, and transformers uses them.
    """
    spec, weights = architecture.decoder, checkpoint.weights
    head, embed = (
        weights.get(architecture.head_copy),
        weights.get(architecture.sources["embed.weight"].tensor),
    )
    if not spec.tied_head or head is None or embed is None or same(head, embed):
        return architecture
    return untied(architecture, Source(architecture.head_copy))


def untied(architecture: Architecture, head: Source) -> Architecture:
    """Return ``architecture`` with a head of its own, which lies at ``head``."""
    decoder = replace(architecture.decoder, tied_head=False)
    return replace(architecture, decoder=decoder, sources={**architecture.sources, "head.weight": head})
