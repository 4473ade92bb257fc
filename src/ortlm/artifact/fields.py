"""What the keys of ``ortlm.json`` may hold: types, and ranges that no model exceeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ortlm._utils.checked_json import (
    Field,
    anything,
    check,
    integer,
    list_of,
    number,
    object_of,
    one_of,
    shown,
    table,
    text,
)
from ortlm.artifact.generation_config import GENERATION
from ortlm.artifact.manifest import GRID, MOST_CROPS, TEXT
from ortlm.errors import BadArtifact

# Beyond these nothing is a language model; within them, nothing that is reserved for them is of any size.
MOST_TOKENS = 10_000_000
MOST_VOCABULARY = 10_000_000
MOST_LAYERS = 10_000
_MOST_WIDTH = 1 << 20
_MOST_STOPS = 1_000

_name = text(longest=500)
_names = object_of(_name, most=10_000)
_token = integer(-1, MOST_VOCABULARY, default=None)

_STATE: Mapping[str, Field] = {
    "past": _name,
    "present": _name,
    "kind": one_of("grow", "append", "window", "conv", "recurrent", default="grow"),
    "axis": integer(2, 3, default=2),
    "heads": integer(1, _MOST_WIDTH, default=None),
    "head_dim": integer(1, _MOST_WIDTH, default=None),
    "window": integer(1, MOST_TOKENS, default=None),
}
_VARIANT: Mapping[str, Field] = {
    "file": text(longest=255),
    "optional": object_of(_name, most=10_000, default={}),
    "onnxruntime": text(longest=20),
    "providers": list_of(text(longest=100), most=100, default=[]),
}
_GRAPH: Mapping[str, Field] = {
    "file": text(longest=255),
    "inputs": _names,
    "outputs": _names,
    "states": list_of(table(_STATE, unknown="refuse"), most=4 * MOST_LAYERS),
    "optional": object_of(_name, most=10_000, default={}),
    "onnxruntime": text(longest=20, default=None),
    "variants": list_of(table(_VARIANT, unknown="keep"), most=10, default=[]),
}
_channels = list_of(number(-1e6, 1e6), least=3, most=3)
_spreads = list_of(number(1e-6, 1e6), least=3, most=3)
_PATCHES: Mapping[str, Field] = {
    "size": integer(1, 65_535),
    "merge": integer(1, 65_535),
    "frames": integer(1, 65_535),
    "least": integer(1, 1 << 40),
    "most": integer(1, 1 << 40),
}
_PAN_AND_SCAN: Mapping[str, Field] = {
    "smallest": integer(1, 65_535),
    "ratio": number(0, 1e6),
    "before": text(longest=1_000),
    "between": text(longest=1_000),
    "separator": text(longest=1_000),
}
_IMAGES: Mapping[str, Field] = {
    "side": integer(1, 65_535),
    "mean": _channels,
    "std": _spreads,
    "tag": text(longest=1_000),
    "crops": integer(0, MOST_CROPS, default=0),
    "merged": integer(1, 65_535, default=12),
    "tokens": integer(0, MOST_TOKENS, default=0),
    "before": text(longest=1_000, default=""),
    "after": text(longest=1_000, default=""),
    "token": text(longest=1_000, default=None),
    "separate": one_of(True, False, default=False),
    "patches": table(_PATCHES, unknown="refuse", default=None),
    "positions": one_of(TEXT, GRID, default=TEXT),
    "patch": integer(0, 65_535, default=0),
    "tag_end": text(longest=1_000, default="\n"),
    "adapter": text(longest=255, default=None),
    "pan_and_scan": table(_PAN_AND_SCAN, unknown="refuse", default=None),
}
_MANIFEST: Mapping[str, Field] = {
    "graphs": object_of(table(_GRAPH, unknown="keep"), most=100),
    "context_tokens": integer(1, MOST_TOKENS),
    "vocab_size": integer(1, MOST_VOCABULARY),
    "stop_token_ids": list_of(integer(0, MOST_VOCABULARY), most=_MOST_STOPS),
    "pad_token_id": _token,
    "bos_token_id": _token,
    "rope_switch_tokens": integer(1, MOST_TOKENS, default=None),
    "generation": table(GENERATION, default={}),
    "session_options": object_of(anything(default=None), default={}),
    "adapters": object_of(text(longest=255), default={}),
    "info": object_of(anything(default=None), default={}),
    "images": table(_IMAGES, unknown="refuse", default=None),
    "prompt_tokens": integer(1, MOST_TOKENS, default=None),
    "device": text(longest=100, default=None),
    "device_options": object_of(anything(default=None), default={}),
}


def check_manifest(found: Mapping[str, Any], file: object) -> dict[str, Any]:
    """Return the contents of ``ortlm.json``, all defaults filled in; what a newer ortlm added stays.

    Raises BadArtifact for a value of another type or out of its range, by its key.
    """
    values = check(found, _MANIFEST, file=file, error=BadArtifact, unknown="keep")
    check_stops(values["stop_token_ids"], values["vocab_size"], file, "stop_token_ids")
    for name, graph in values["graphs"].items():
        _check_version(graph["onnxruntime"] or "0.0", f"{file}: graphs.{name}.onnxruntime")
        for i, variant in enumerate(graph["variants"]):
            _check_version(variant["onnxruntime"], f"{file}: graphs.{name}.variants[{i}].onnxruntime")
        for i, state in enumerate(graph["states"]):
            at = f"{file}: graphs.{name}.states[{i}].window"
            if (state["kind"] == "window") != (state["window"] is not None):
                raise BadArtifact(f"{at} belongs to states of kind window, and to no others.")
            if state["window"] is not None and state["window"] > values["context_tokens"]:
                raise BadArtifact(
                    f"{at} is {state['window']}, more than the context of {values['context_tokens']} tokens."
                )
    return values


def _check_version(version: str, at: str) -> None:
    if not re.fullmatch(r"\d{1,6}\.\d{1,6}", version, re.ASCII):
        raise BadArtifact(f"{at} is {shown(version)}, expected a version of ONNX Runtime such as 1.32.")


def check_stops(ids: list[int], vocabulary: int, file: object, at: str) -> None:
    """Raise BadArtifact for tokens beyond the vocabulary, since no answer would ever end in one."""
    for token in ids:
        if vocabulary and token >= vocabulary:
            raise BadArtifact(
                f"{file}: {at} names token {token}, but the vocabulary has {vocabulary:,} tokens. Build the model "
                "again."
            )
