"""Scales of an int8 key/value cache, from what a model with a float cache puts there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import Artifact
from ortlm.calibration.texts import TEXTS
from ortlm.dtypes import Floats
from ortlm.errors import BadCheckpoint
from ortlm.graph.attention import CacheScales
from ortlm.runtime.language_model import LanguageModel
from ortlm.spec import Attention, Decoder, Rope

# Other texts reach further than these few: with less, numbers are cut off, with more, all become coarser. On the
# model that ships with the project 1.25 loses least, and twice the tokens gain nothing.
MARGIN = 1.25
_TEXT_TOKENS, _RANDOM_TOKENS, _SHORT_ROWS = 128, 128, 24
# A channel that was silent here may speak elsewhere: none gets less than this share of the largest one's reach.
_LEAST = 1 / 256


def cache_scales(
    artifact: Artifact, spec: Decoder, *, per_channel: bool, threads: int | None = None
) -> list[CacheScales]:
    """Return the scales of every layer of ``artifact`` with a cache, a build of ``spec`` whose cache is float.

    A scale is the largest absolute value that a channel (or, unless ``per_channel``, any channel) takes while the
    model reads texts and random tokens, with each of its adapters and without, times 1.25, divided by 127.
    Raises BadCheckpoint if the model computes something infinite.
    """
    # Twice for each layer: keys, values.
    layers, mixers = [i for i, _ in spec.cached], [mixer for _, mixer in spec.cached]
    absmax: list[Floats] = [np.zeros((m.kv_heads, m.head_dim), np.float32) for m in mixers for _ in "kv"]
    lm = LanguageModel(artifact, threads=threads, prefix_caches=0)
    for adapter in (None, *lm.adapters):
        for tokens in _prompts(lm):
            generator = lm.generator(adapter=adapter)
            generator.append(tokens)
            for i, state in enumerate(generator.loop.cache.read()):
                seen = np.abs(state).max(axis=(0, 2)) if i % 2 else key_absmax(state, mixers[i // 2])
                absmax[i] = np.maximum(absmax[i], seen)
    for i, largest in enumerate(absmax):
        if not np.isfinite(largest).all():
            what = f"{'values' if i % 2 else 'keys'} of layer {layers[i // 2]}"
            raise BadCheckpoint(
                f"the {what} become infinite while the model reads a text, so an int8 cache has no "
                "scale: the checkpoint is damaged or training diverged."
            )
    scales = [_scale(largest, per_channel=per_channel) for largest in absmax]
    return [CacheScales(key, value) for key, value in zip(scales[::2], scales[1::2], strict=True)]


def key_absmax(keys: NDArray[np.floating], mixer: Attention) -> Floats:
    """Return how large each channel of rotated ``keys`` [B, K, length, D] may become at any position, [K, D].

    Rotation turns pairs of channels (Su et al. 2021, RoFormer), some so slowly that a short text sees a part of
    the circle only; at another position a channel may be as large as its pair is long.
    """
    x = keys.astype(np.float32)
    rope = mixer.rope
    if rope is not None:
        first, second = _pairs(rope)
        # A table for long texts turns elsewhere, and may scale differently.
        long = max(1.0, rope.long_factor / rope.factor) if rope.long_inv_freq is not None else 1.0
        radius = long * np.hypot(x[..., first], x[..., second])
        x[..., first] = x[..., second] = radius
    absmax: Floats = np.abs(x).max(axis=(0, 2))
    return absmax


def _pairs(rope: Rope) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the channels that are rotated together."""
    if rope.interleaved:
        return np.arange(0, rope.dims, 2), np.arange(1, rope.dims, 2)
    half = rope.dims // 2
    return np.arange(half), np.arange(half, rope.dims)


def _prompts(lm: LanguageModel) -> Iterator[Sequence[int]]:
    """Yield what the model reads: texts, then tokens that it knows, in no order, after its special ones."""
    context = lm.manifest.context_tokens
    for text in TEXTS:
        yield lm.encode(text)[: min(_TEXT_TOKENS, context)]
    vocab = lm.vocab_size
    known = np.setdiff1d(np.arange(vocab), lm.tokenizer.unknown_ids(vocab))
    random = np.random.default_rng(0)
    drawn = random.choice(known, _RANDOM_TOKENS)
    bos = lm.manifest.bos_token_id
    special = [*([] if bos is None else [bos]), *lm.manifest.stop_token_ids]
    yield [*special, *drawn.tolist()][:context]
    # The first positions of a row attend to few others, and reach furthest.
    for row in random.choice(known, (_SHORT_ROWS, 8)).tolist():
        yield row[:context]


def _scale(reach: Floats, *, per_channel: bool) -> Floats:
    """Return the scale float32 of channels that reach so far [K, D]: [1, K, 1, D], or [1]."""
    largest = float(reach.max()) or 1.0
    if not per_channel:
        return np.array([largest * MARGIN / 127], np.float32)
    raised = np.maximum(reach, largest * _LEAST) * (MARGIN / 127)
    return raised.astype(np.float32)[None, :, None, :]
