"""GGUF files written byte by byte, so that any of them can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_FORMS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}


class Typed:
    """A value of metadata with the type that it is written as."""

    def __init__(self, kind: int, value: Any, of: int | None = None) -> None:
        self.kind, self.value, self.of = kind, value, of


def text(value: str) -> bytes:
    """Return a string as GGUF has it."""
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def value_of(value: Any) -> bytes:
    """Return a value with its type before it."""
    if isinstance(value, Typed):
        if value.kind == ARRAY:
            of = value.of or U32
            return struct.pack("<IIQ", ARRAY, of, len(value.value)) + b"".join(
                _bare(of, v) for v in value.value
            )
        return struct.pack("<I", value.kind) + _bare(value.kind, value.value)
    if isinstance(value, bool):
        return value_of(Typed(BOOL, value))
    if isinstance(value, int):
        return value_of(Typed(U32 if 0 <= value < 2**32 else U64, value % 2**64))
    if isinstance(value, float):
        return value_of(Typed(F32, value))
    if isinstance(value, str):
        return value_of(Typed(STRING, value))
    if isinstance(value, list) and value and isinstance(value[0], str):
        return value_of(Typed(ARRAY, value, STRING))
    if isinstance(value, list):
        return value_of(Typed(ARRAY, value, F32 if value and isinstance(value[0], float) else I32))
    raise TypeError(value)


def _bare(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack(_FORMS[kind], value)


def header_of(
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, Sequence[int], int, int]],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: int | None = None,
    count: int | None = None,
) -> bytes:
    """Return a header; ``tensors`` are name, sizes (columns first), type and offset of each."""
    parts = [magic, struct.pack("<I", version)]
    parts.append(struct.pack("<Q", len(tensors) if count is None else count))
    parts.append(struct.pack("<Q", len(metadata) if keys is None else keys))
    parts += [text(key) + value_of(value) for key, value in metadata.items()]
    for name, sizes, kind, offset in tensors:
        parts.append(text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset))
    return b"".join(parts)


def file_of(metadata: Mapping[str, Any], tensors: Mapping[str, Any], **changes: Any) -> bytes:
    """Return a whole file; ``tensors`` are float32 arrays."""
    entries, data = [], b""
    for name, value in tensors.items():
        entries.append((name, value.shape[::-1], 0, len(data)))
        data += value.tobytes() + bytes(-value.nbytes % 32)
    header = header_of(metadata, entries, **changes)
    return header + bytes(-len(header) % 32) + data


def smallest() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metadata and tensors of the smallest language model: one layer, and a token for each byte."""
    # The letters that byte-level BPE writes bytes with.
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    letters = {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = ["<s>", "</s>", *(letters[b] for b in range(256)), "th", "the"]
    vocab, hidden, wide = len(tokens), 32, 64
    generator = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Any:
        return (0.1 * generator.standard_normal((rows, columns))).astype(np.float32)

    metadata = {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.context_length": 128,
        "llama.embedding_length": hidden,
        "llama.block_count": 1,
        "llama.feed_forward_length": wide,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": vocab,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (vocab - 2)],
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0].content }}</s>",
    }
    tensors = {
        "token_embd.weight": matrix(vocab, hidden),
        "blk.0.attn_norm.weight": np.ones(hidden, np.float32),
        "blk.0.attn_q.weight": matrix(32, hidden),
        "blk.0.attn_k.weight": matrix(16, hidden),
        "blk.0.attn_v.weight": matrix(16, hidden),
        "blk.0.attn_output.weight": matrix(hidden, 32),
        "blk.0.ffn_norm.weight": np.ones(hidden, np.float32),
        "blk.0.ffn_gate.weight": matrix(wide, hidden),
        "blk.0.ffn_up.weight": matrix(wide, hidden),
        "blk.0.ffn_down.weight": matrix(hidden, wide),
        "output_norm.weight": np.ones(hidden, np.float32),
    }
    return metadata, tensors
