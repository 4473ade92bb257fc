"""The graphs of a model, emitted as the options of a build ask for them, and their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ortlm.builder.kept_weights import KeptWeights
from ortlm.builder.options import BuildOptions, make_recipe
from ortlm.graph.attention import CacheScales
from ortlm.graph.decoder import Emitted, emit_decoder
from ortlm.spec import Architecture
from ortlm.target import Target
from ortlm.weights.lora import Adapter


def decoder_graph(
    architecture: Architecture,
    target: Target,
    precision: str,
    options: BuildOptions,
    adapters: Iterable[Adapter],
    cache_scales: Sequence[CacheScales] | None = None,
    *,
    kept: KeptWeights,
) -> Emitted:
    """Return the decoder's graph; its cache is int8 with ``cache_scales``, of each layer.

    ``kept`` are carried over from the checkpoint.
    """
    return emit_decoder(
        architecture.decoder,
        target=target,
        dtype=target.precisions[precision],
        recipe=kept.recipe(make_recipe(precision, target, options)),
        all_logits=options.all_logits,
        hidden_states=options.hidden_states,
        adapted=frozenset(weight for adapter in adapters for weight in adapter.deltas),
        cache_scales=cache_scales,
        embedded=architecture.vision is not None,
        mutual=architecture.vision is not None and architecture.vision.mutual,
        fast_prompts=options.fast_prompts,
        integer_only=options.integer_only,
    )


def other_graphs(
    architecture: Architecture, target: Target, precision: str, options: BuildOptions
) -> dict[str, Emitted]:
    """Return the graphs that a model has in addition to its decoder, by name."""
    vision = architecture.vision
    if vision is None:
        return {}
    # Text takes all of these modules to import; nothing but images takes this one.
    from ortlm.graph.embedding import emit_embedding
    from ortlm.graph.vision import emit_vision

    dtype, recipe = target.precisions[precision], make_recipe(precision, target, options)
    spec = architecture.decoder
    return {
        "vision": emit_vision(
            vision,
            hidden=spec.hidden,
            target=target,
            dtype=dtype,
            recipe=recipe,
            fast_prompts=options.fast_prompts,
        ),
        "embedding": emit_embedding(spec, token=vision.token, target=target, dtype=dtype, recipe=recipe),
    }


def graph_file(graph: str) -> str:
    """Return the file of a graph other than the decoder."""
    return f"{graph}.onnx"


def ragged_file(filename: str) -> str:
    """Return the file of the decoder that takes lengths per row, next to the one in ``filename``."""
    return f"{filename.removesuffix('.onnx')}_ragged.onnx"


def with_lengths(target: Target) -> Target:
    """Return ``target`` for the decoder that takes lengths per row."""
    return replace(target, query_lengths=True)
