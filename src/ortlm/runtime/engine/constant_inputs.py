"""Graphs for devices that take no inputs with a default value."""

from __future__ import annotations

from pathlib import Path


def with_constant_defaults(path: Path) -> bytes:
    """Return the graph in ``path`` with its optional inputs made constants of their default values.

    Its weights stay in their files.
    """
    # It takes most of a second to import, and most devices do without.
    import onnx_ir as ir

    model = ir.load(path)
    for value in list(model.graph.inputs):
        if value.name in model.graph.initializers:
            model.graph.inputs.remove(value)
    found: bytes = ir.to_proto(model).SerializeToString()
    return found
