"""Refuses graphs of which a device's attention would ignore a part without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ortlm.errors import BadOption
from ortlm.runtime.engine.devices import Device

_POSITIONS = 9  # which input of GroupQueryAttention


def check_attention(path: Path, device: Device, context_tokens: int) -> None:
    """Raise BadOption if the graph in ``path`` asks attention for something that ``device`` ignores.

    That is "softcap", a cap on scores; "window", if it is shorter than the context; "rotation" within attention;
    "positions" at which it rotates; "eviction", a cache that holds a window only. Nothing is read for devices
    that ignore nothing.
    """
    if not device.attention_ignores:
        return
    # It takes most of a second to import, and most devices do without.
    import onnx_ir as ir

    found = set()
    for node in ir.load(path).graph.all_nodes():
        if node.op_type == "GroupQueryAttention":
            found |= set(_asked(node, context_tokens))
    ignored = sorted(found & device.attention_ignores)
    if ignored:
        raise BadOption(
            f"{path} asks attention for {' and '.join(ignored)}, which {device.provider} ignores without a word, "
            f"so that the output would be wrong. Build the model with -e {device.kind}, or choose another device: "
            "--device cpu."
        )


def _asked(node: Any, context_tokens: int) -> Iterator[str]:
    """Yield what an attention node asks for beyond the plain."""

    def value(name: str) -> float:
        return float(node.attributes[name].value) if name in node.attributes else 0.0

    if value("softcap"):
        yield "softcap"
    if 0 < value("local_window_size") < context_tokens:
        yield "window"
    if value("do_rotary"):
        yield "rotation"
        if len(node.inputs) > _POSITIONS and node.inputs[_POSITIONS] is not None:
            yield "positions"
    if value("sliding_window_cache"):
        yield "eviction"
