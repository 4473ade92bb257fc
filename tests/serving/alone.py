"""What a model says to a request when it is alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import ortlm
from ortlm.runtime.generation.stream import Generation
from ortlm.serving.engine import Engine, EngineOptions


def says_alone(lm: ortlm.LanguageModel, prompt: Any, **options: Any) -> Generation:
    """Return how ``lm`` continues ``prompt`` alone, by ``lm.generate`` if that rounds as an engine does.

    Otherwise by an engine that has nothing else to do: one never computes a single row.
    """
    if single_rows_are_alike(lm):
        return lm.generate(prompt, reuse_cache=False, **options)
    with Engine(lm, EngineOptions(batch=1, reuse_answers=False)) as engine:
        return engine.submit(lm.encode(prompt), **options).result()


@cache
def single_rows_are_alike(lm: ortlm.LanguageModel) -> bool:
    """Return whether kernels round a single row as they do each of several.

    On x86 without VNNI those for 4-bit weights do not: sums come in another order.
    """
    text = lm.encode("def read_lines(path):")
    found = []
    for rows in (1, 2):
        loop = lm.loop()
        loop.start(rows)
        loop.append([text] * rows)
        found.append(loop.step([text[0]] * rows)[0].copy())
    return np.array_equal(*found)
