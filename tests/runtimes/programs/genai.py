"""Greedy tokens from onnxruntime-genai, in the environment that this runs in."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_genai as og


def answer(case):
    if case["image"] is not None:
        return {}
    try:
        config = og.Config(case["folder"])
        config.clear_providers()
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
        model = og.Model(config)
        params = og.GeneratorParams(model)
        length = len(case["prompt"]) + case["steps"]
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(case["prompt"], np.int32))
        logits = generator.get_logits()[0, -1].tolist()
        while generator.token_count() < length:
            generator.generate_next_token()
        tokens = [int(token) for token in generator.get_sequence(0)[len(case["prompt"]) :]]
        return {"tokens": tokens, "logits": logits}
    except RuntimeError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    og.disable_telemetry_events()
    cases = json.loads(Path(sys.argv[1]).read_text())
    version = f"{og.__version__} on {onnxruntime.__version__}"
    answers = {"version": version, "cases": {case["name"]: answer(case) for case in cases}}
    Path(sys.argv[2]).write_text(json.dumps(answers))
