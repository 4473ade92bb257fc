"""Tables of cosines and sines for rotary position embedding."""

from __future__ import annotations

import numpy as np

from ortlm.graph.builder import MICROSOFT, Builder, Value
from ortlm.spec import Rope


class RopeTables:
    """Cos and sin tables [positions, dims / 2], one pair for each different ``Rope``.

    The graph holds only the frequencies; ONNX Runtime computes the tables once, when it loads the model.
    Stored tables of a 128K context would be as large as the layers of a small model.

    A rope that switches has both tables one below the other: rows [0, switch) are short, the rest long.
    """

    def __init__(self, g: Builder, max_tokens: int) -> None:
        self._g, self._max_tokens = g, max_tokens
        self._made: dict[Rope, tuple[Value, Value]] = {}

    def __call__(self, rope: Rope) -> tuple[Value, Value]:
        """Return the tables for ``rope``."""
        if rope not in self._made:
            self._made[rope] = self._table(rope, f"/model/rotary_emb.{len(self._made)}")
        return self._made[rope]

    def _table(self, rope: Rope, path: str) -> tuple[Value, Value]:
        g, half = self._g, len(rope.inv_freq)
        parts = [(rope.switch_tokens or self._max_tokens, rope.inv_freq, rope.factor)]
        if rope.long_inv_freq is not None and rope.switch_tokens is not None:
            parts.append((self._max_tokens, rope.long_inv_freq, rope.long_factor))
        angles = []
        for i, (rows, frequencies, _) in enumerate(parts):
            positions = g.op(
                "Range",
                g.integer(0), g.integer(rows), g.integer(1),
                shape=(rows,), dtype="int64", name=path,
            )  # fmt: skip
            column = g.op("Unsqueeze", positions, g.integers(1), shape=(rows, 1), dtype="int64", name=path)
            column = g.cast(column, "fp32", (rows, 1), path)
            row = g.constant(np.array([frequencies], np.float32), f"{path}.inv_freq.{i}")
            angles.append(g.op("Mul", column, row, shape=(rows, half), dtype="fp32", name=path))
        tables = []
        for function in ("Cos", "Sin"):
            pieces = []
            for (rows, _, factor), angle in zip(parts, angles, strict=True):
                piece = g.op(function, angle, shape=(rows, half), dtype="fp32", name=path)
                if factor != 1.0:
                    piece = g.op(
                        "Mul", piece, g.number(factor, "fp32"), shape=(rows, half), dtype="fp32", name=path
                    )
                pieces.append(piece)
            total = sum(rows for rows, _, _ in parts)
            table = (
                g.op("Concat", *pieces, shape=(total, half), dtype="fp32", name=path, axis=0)
                if len(pieces) > 1
                else pieces[0]
            )
            tables.append(table if g.dtype == "fp32" else g.cast(table, g.dtype, (total, half), path))
        return tables[0], tables[1]


def rotate(
    g: Builder,
    x: Value,
    positions: Value,
    tables: tuple[Value, Value],
    rope: Rope,
    *,
    heads: int,
    head_dim: int,
    path: str,
) -> Value:
    """Rotate ``x`` [B, S, heads · head_dim] at ``positions`` int64 [B, S]."""
    return g.op(
        "RotaryEmbedding",
        x,
        positions,
        *tables,
        shape=("batch_size", "sequence_length", heads * head_dim),
        name=path,
        domain=MICROSOFT,
        num_heads=heads,
        # 0 means the whole head; a partial rotation has to say its size and its number of heads.
        rotary_embedding_dim=0 if rope.dims == head_dim else rope.dims,
        interleaved=int(rope.interleaved),
    )
