"""What transformers computes, as numpy arrays: the truth that graphs and the runtime are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Logits = NDArray[np.float32]


def prompt_logits(model: Any, tokens: Sequence[int]) -> Logits:
    """Return the logits [S, V] of one prompt, read at once without a cache."""
    with torch.no_grad():
        return np.asarray(model(input_ids=_row(tokens), use_cache=False).logits[0])


def decode_logits(model: Any, tokens: Sequence[int], *, prompt: int = 1) -> Logits:
    """Return the logits [S, V] of ``tokens`` read as ``prompt`` tokens at once, then one by one with a cache.

    Once the length exceeds the LongRoPE switch everything is read again, as ``generate`` does; the earlier
    rows keep what was computed with the short table.
    """
    switch = switch_tokens(model.config)
    rows: list[Logits] = []
    cache = None
    with torch.no_grad():
        for end in range(prompt, len(tokens) + 1):
            fresh = not rows or end - 1 == switch
            begin = 0 if fresh else end - 1
            out = model(
                input_ids=_row(tokens[begin:end]),
                past_key_values=None if fresh else cache,
                position_ids=torch.arange(begin, end)[None],
                use_cache=True,
            )
            cache = out.past_key_values
            rows.append(np.asarray(out.logits[0]) if not rows else np.asarray(out.logits[0, -1:]))
    return np.concatenate(rows)


def batch_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Logits]:
    """Return the logits [S_i, V] of every row of a ragged batch: each row alone, so padding cannot matter.

    With LongRoPE all rows must lie on one side of the switch, because a batch shares one table.
    """
    return [prompt_logits(model, row) for row in rows]


def greedy(model: Any, tokens: Sequence[int], *, steps: int = 64) -> list[int]:
    """Return the ``steps`` most likely next tokens after ``tokens``, by ``generate`` with a cache."""
    ids = _row(tokens)
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, use_cache=True
        )
    new: list[int] = out[0, len(tokens) :].tolist()
    assert len(new) == steps, "the model stopped early; save() turns its eos tokens off"
    return new


def switch_tokens(config: Any) -> int | None:
    """Return the length beyond which LongRoPE uses its long table, or None."""
    rope = config.rope_parameters
    long = rope.get("rope_type") == "longrope"
    return int(rope["original_max_position_embeddings"]) if long else None


def random_tokens(count: int, *, seed: int = 0, vocab: int = 288) -> list[int]:
    """Return ``count`` token ids drawn evenly from [0, vocab)."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, vocab, count)]


def relative_error(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return ||a - b|| / ||b|| over all elements, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _row(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64)
