"""Diverse beam search in plain Python: slow, and short enough to be checked by reading.

Vijayakumar et al., https://arxiv.org/abs/1610.02424, with the bookkeeping of transformers 4: a list of finished
continuations for each group, complete when nothing that runs can enter it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np


def diverse(
    table: np.ndarray, prompt: list[int], settings: Any, stop_ids: list[int]
) -> list[tuple[tuple[int, ...], float]]:
    """Return new tokens and score of the best continuations of ``prompt``, given logits by the last two."""
    size = settings.num_beams // settings.num_beam_groups
    limit, penalty = settings.max_new_tokens, settings.length_penalty
    running: list[list[tuple[tuple[int, ...], float]]] = [
        [((), 0.0)] for _ in range(settings.num_beam_groups)
    ]
    lists: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in running]
    done = [False for _ in running]
    for length in range(1, limit + 1):
        taken: Counter[int] = Counter()
        for group in range(settings.num_beam_groups):
            if done[group]:
                continue
            every = []
            for past, score in running[group]:
                before, last = [*prompt, *past][-2:]
                logits = table[before, last].astype(np.float64)
                log_probs = logits - np.log(np.exp(logits).sum())
                for token, log_prob in enumerate(log_probs):
                    every.append(
                        ((*past, token), score + log_prob - settings.diversity_penalty * taken[token])
                    )
            every = ranked(every)[: size * max(2, 1 + len(stop_ids))]
            for sequence, score in every[:size]:
                if sequence[-1] in stop_ids:
                    lists[group] = ranked([*lists[group], (sequence, score / length**penalty)])[:size]
            running[group] = [found for found in every if found[0][-1] not in stop_ids][:size]
            taken.update(sequence[-1] for sequence, _ in running[group])
            done[group] = complete(lists[group], size, every[0][1], length, settings)
    for group, beams in enumerate(running):
        if not done[group]:
            ended = [(sequence, score / limit**penalty) for sequence, score in beams]
            lists[group] = ranked([*lists[group], *ended])[:size]
    return ranked([found for group in lists for found in group])[: settings.num_return_sequences]


def complete(found: list[Any], size: int, best: float, length: int, settings: Any) -> bool:
    if len(found) < size:
        return False
    if settings.early_stopping is True:
        return True
    far = settings.early_stopping == "never" and settings.length_penalty > 0
    attainable = best / (settings.max_new_tokens if far else length) ** settings.length_penalty
    return bool(found[-1][1] >= attainable)


def ranked(found: list[Any]) -> list[Any]:
    return sorted(found, key=lambda item: -item[1])
