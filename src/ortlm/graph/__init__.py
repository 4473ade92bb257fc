"""From spec to ONNX graph: one emitter per kind of block, no weights, no files."""
