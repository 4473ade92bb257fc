"""The official runtime, onnxruntime-genai, on a folder: it must run what ortlm builds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


def greedy(folder: Path, prompt: Sequence[int], *, steps: int, adapter: Path | None = None) -> list[int]:
    """Return ``steps`` greedy tokens after ``prompt``, with the LoRA in file ``adapter``.

    End tokens are never chosen.
    """
    og = pytest.importorskip("onnxruntime_genai")
    og.disable_telemetry_events()
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    model = og.Model(config)
    length = len(prompt) + steps
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    adapters = og.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), "adapter")
        generator.set_active_adapter(adapters, "adapter")
    generator.append_tokens(np.array(prompt, np.int32))
    while generator.token_count() < length:
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)[len(prompt) :]]
