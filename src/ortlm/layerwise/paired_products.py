"""Products of two models that differ little, by integer matmul."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ortlm._utils.cpu import INTEGERS_DO_NOT_OVERFLOW
from ortlm.dtypes import Floats
from ortlm.graph.integer_matmul import paired_products
from ortlm.quant.per_channel import turned_columns
from ortlm.runtime.engine.session import Session

# Tokens at once: what comes between two operators stays in the processor's cache, and kernels run at full speed.
_TOKENS = 256
# Weights of a matrix up to which three of them fit into one graph.
_MOST = 1 << 29


class PairedProducts:
    """Multiplies a quantized model's inputs by ``matrix`` [out, in], and the float model's by ``other``.

    By ``graph.integer_matmul.paired_products``: what both have in common is rounded to 8 bits, as if the text had
    been a slightly different one; the difference between them, which calibration looks at, is rounded by itself.
    """

    def __init__(self, matrix: Floats, other: Floats, pool: Executor, *, threads: int | None = None) -> None:
        self._pair = matrix, other
        self._session: Session | None = None
        if matrix.size > _MOST:
            return
        columns = [turned_columns(weight, pool) for weight in (matrix, other, other - matrix)]
        model = paired_products(*columns)
        # Matrices in the graph are brought into the kernel's layout once. It is run a few times and forgotten.
        self._session = Session(
            Path("paired_products.onnx"),
            threads=threads,
            options={"session.intra_op.allow_spinning": "0", INTEGERS_DO_NOT_OVERFLOW: "1"},
            model=ir.to_proto(model).SerializeToString(),
        )

    def __call__(self, x: Floats, other: Floats) -> tuple[Floats, Floats]:
        """Return the products of ``x`` [B, S, in] and ``other``, [B, S, out] each."""
        matrices, given = self._pair, (x, other)
        if self._session is None:
            first, second = (a @ weight.T for a, weight in zip(given, matrices, strict=True))
            return first, second
        results = tuple(np.empty((*x.shape[:-1], len(matrices[0])), np.float32) for _ in given)
        rows = {"x": x, "other_x": other, "result": results[0], "other_result": results[1]}
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in rows.items()}
        binding = self._session.binding()
        for a in range(0, len(flat["x"]), _TOKENS):
            for name, array in flat.items():
                bind = binding.output if "result" in name else binding.input
                bind(name, self._session.tensor(array[a : a + _TOKENS]))
            self._session.run(binding)
        # Rounding makes a number of whatever is none.
        for source, result in zip(given, results, strict=True):
            if not np.isfinite(source.sum(dtype=np.float64)):
                result[...] = np.nan
        return results[0], results[1]
