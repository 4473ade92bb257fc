"""Greedy tokens from the ONNX Runtime of the environment that this runs in: plainly, and through ortlm."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

import ortlm

KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def best(logits, never):
    """Return the id that greedy decoding takes."""
    logits = logits.astype(np.float32)
    logits[list(never)] = -np.inf
    return int(np.argmax(logits))


def plain(folder, case):
    """Run ``model.onnx`` as a program does that knows its inputs and nothing of ortlm."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    given = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    feed = {
        # What grows begins with nothing; states of one size begin with zeros.
        name: np.zeros((1, *(n if isinstance(n, int) else 0 for n in value.shape[1:])), KINDS[value.type])
        for name, value in given.items()
        if name.startswith("past")
    }
    new, total, logits = case["prompt"], 0, []
    tokens = []
    while len(tokens) < case["steps"]:
        feed["input_ids"] = np.array([new], np.int64)
        if "position_ids" in given:
            feed["position_ids"] = np.arange(total, total + len(new))[None]
        total += len(new)
        feed["attention_mask"] = np.ones((1, total), np.int64)
        found = dict(zip(outputs, session.run(None, feed), strict=True))
        logits.append(found["logits"][0, -1])
        new = [best(logits[-1], case["never"])]
        tokens += new
        feed |= {
            name.replace("present", "past_key_values"): value
            for name, value in found.items()
            if name.startswith("present")
        }
    return {"tokens": tokens, "logits": logits[0].tolist()}


def through_ortlm(folder, case):
    """Return what ortlm's own runtime makes of it."""
    lm = ortlm.load(folder, threads=1, prefix_caches=0, device="cpu")
    prompt, image = case["prompt"], case["image"]
    if image is not None:
        text = lm.tokenizer.decode(prompt)
        prompt = lm.encode(lm.manifest.images.tag.format(1) + text, images=[image])
    loop, tokens = lm.loop(), []
    loop.start()
    logits = loop.append([prompt])[0].copy()
    found = logits
    while len(tokens) < case["steps"]:
        tokens.append(best(found.copy(), case["never"]))
        found = loop.step(tokens[-1:])[0]
    return {
        "tokens": tokens,
        "logits": logits.tolist(),
        "graph": lm.session.path.name,
        "ragged": 0.0 if image is not None else ragged(lm, prompt),
    }


def ragged(lm, prompt):
    """Return how far rows of different lengths, appended to in different amounts, are from each row alone."""
    first, then = (7, 3, 11), (4, 9, 1)
    rows = [prompt[start : start + a + b] for start, a, b in zip((0, 2, 4), first, then, strict=True)]
    loop = lm.loop()
    loop.start(len(rows))
    loop.append([row[:a] for row, a in zip(rows, first, strict=True)])
    got = loop.append([row[a:] for row, a in zip(rows, first, strict=True)]).copy()
    alone = np.stack([lm.logits(row)[-1] for row in rows])
    return float(np.abs(got - alone).max() / np.abs(alone).max())


def answer(case):
    folder, found = Path(case["folder"]), {}
    try:
        found["ortlm"] = through_ortlm(folder, case)
    except ortlm.errors.Error as error:
        found["ortlm"] = {"error": str(error)}
    if case["plain"]:
        try:
            found |= plain(folder, case)
        except (
            state.Fail,
            state.InvalidArgument,
            state.InvalidGraph,
            state.NotImplemented,
            state.RuntimeException,
        ) as error:
            found["error"] = str(error)
    return found


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    answers = {"version": onnxruntime.__version__, "cases": {case["name"]: answer(case) for case in cases}}
    Path(sys.argv[2]).write_text(json.dumps(answers))
