"""Graphs of a few operators, written without a library: to import one takes longer than a first token."""

from __future__ import annotations

from collections.abc import Sequence

from ortlm._utils.protobuf import field
from ortlm.dtypes import BY_ONNX, Array

# Numbers of fields in onnx.proto.
_MODEL_IR_VERSION, _MODEL_GRAPH, _MODEL_OPSET, _OPSET_VERSION = 1, 7, 8, 2
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TYPE, _INTEGER = 1, 3, 20, 2
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR = 1, 2, 1
_TYPE_ELEMENT, _TYPE_SHAPE, _SHAPE_DIMENSION, _DIMENSION_NAME = 1, 2, 1, 2

_IR_VERSION = 8
_ONNX = {kind.numpy: number for number, kind in BY_ONNX.items()}


class SmallGraph:
    """A graph of operators of ``opset``, which grows by what is called; element types are ONNX's numbers."""

    def __init__(self, name: str, opset: int) -> None:
        self._graph = field(_GRAPH_NAME, name.encode())
        self._opset = opset
        self._made = 0

    def input(self, name: str, kind: int, dimensions: Sequence[str] | None = None) -> str:
        """Add an input of any size, or of any shape without ``dimensions``; return its name."""
        self._graph += field(_GRAPH_INPUT, _value(name, kind, dimensions))
        return name

    def output(self, name: str, kind: int, dimensions: Sequence[str] | None = None) -> None:
        """Let the value ``name`` be an output, of any size."""
        self._graph += field(_GRAPH_OUTPUT, _value(name, kind, dimensions))

    def constant(self, name: str, array: Array) -> str:
        """Add a constant and return its name."""
        tensor = b"".join(field(_TENSOR_DIMS, size) for size in array.shape)
        tensor += field(_TENSOR_TYPE, _ONNX[array.dtype]) + field(_TENSOR_NAME, name.encode())
        self._graph += field(_GRAPH_INITIALIZER, tensor + field(_TENSOR_RAW, array.tobytes()))
        return name

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: int) -> str:
        """Add an operator whose only output is called ``name``; return that."""
        self._made += 1
        name = f"value_{self._made}" if name is None else name
        node = b"".join(field(_NODE_INPUT, given.encode()) for given in inputs)
        node += field(_NODE_OUTPUT, name.encode()) + field(_NODE_KIND, kind.encode())
        for key, number in attributes.items():
            # Protobuf writes what is negative as 64 bits.
            attribute = field(_ATTRIBUTE_NAME, key.encode())
            attribute += field(_ATTRIBUTE_INTEGER, number & (1 << 64) - 1)
            node += field(_NODE_ATTRIBUTE, attribute + field(_ATTRIBUTE_TYPE, _INTEGER))
        self._graph += field(_GRAPH_NODE, node)
        return name

    def model(self) -> bytes:
        """Return the whole as ONNX Runtime loads it."""
        model = field(_MODEL_IR_VERSION, _IR_VERSION)
        model += field(_MODEL_OPSET, field(_OPSET_VERSION, self._opset))
        return model + field(_MODEL_GRAPH, self._graph)


def _value(name: str, kind: int, dimensions: Sequence[str] | None) -> bytes:
    tensor = field(_TYPE_ELEMENT, kind)
    if dimensions is not None:
        names = (field(_DIMENSION_NAME, name.encode()) for name in dimensions)
        tensor += field(_TYPE_SHAPE, b"".join(field(_SHAPE_DIMENSION, dimension) for dimension in names))
    return field(_VALUE_NAME, name.encode()) + field(_VALUE_TYPE, field(_TYPE_TENSOR, tensor))
