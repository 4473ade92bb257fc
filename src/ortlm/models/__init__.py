"""Entry points under the names that users of onnxruntime-genai type."""
