"""Integer matmuls: many rows at once, at the speed of processors that have instructions for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ortlm.dtypes import Array
from ortlm.graph.builder import MICROSOFT, Builder, Shape, Value
from ortlm.quant.recipe import Uniform
from ortlm.target import HERE

_ZERO = 128
# Codes int8 [in, out] with scales float32 [out].
Columns = tuple[Array, Array]


def as_rows(g: Builder, x: Value, inputs: int, path: str) -> Value:
    """Return ``x`` [..., in] as [rows, in].

    Emitted outside of branches, where it is the same memory; inside, ONNX Runtime would copy it.
    """
    return g.op("Reshape", x, g.integers(-1, inputs), shape=("rows", inputs), name=f"{path}/integer")


def integer_products(
    g: Builder,
    x: Value,
    rows: Value,
    matrices: Sequence[tuple[Value, Value]],
    *,
    inputs: int,
    shapes: Sequence[Shape],
    path: str,
) -> list[Value]:
    """Multiply ``x`` [..., in] by each of ``matrices``: codes int8 [in, out] with scales float32 [out].

    ``rows`` is ``x`` as [rows, in]; results [..., out] have ``shapes``. Each row is rounded to 8 bits by its own
    largest value: unsigned, because that is what the fast kernels take together with signed weights; the zero
    point of 128 makes it symmetric.
    """
    path = f"{path}/integer"
    lead = shapes[0][:-1]

    def op(kind: str, *values: Value, out: Shape = ("rows",), of: str = "fp32", **attributes: int) -> Value:
        return g.ops(kind, values, outputs=[(of, out)], name=path, attributes=attributes)[0]

    # Of the largest and the smallest, rather than of absolute values: that would write all of them.
    least = op("Neg", op("ReduceMin", rows, g.integers(-1), keepdims=0))
    most = op("Max", op("ReduceMax", rows, g.integers(-1), keepdims=0), least)
    # A row of zeros has any scale.
    step = op("Max", op("Mul", most, g.number(1 / 127, "fp32")), g.number(1e-30, "fp32"))
    zero = g.constant(np.array(_ZERO, np.uint8), f"uint8/{_ZERO}")
    zeros = op("Expand", zero, op("Shape", step, out=(1,), of="int64"), of="uint8")
    # ONNX Runtime's own form of it, which older versions have too.
    unsigned = g.op(
        "QuantizeLinear", rows, step, zeros,
        shape=("rows", inputs), dtype="uint8", name=path, domain=MICROSOFT, axis=0,
    )  # fmt: skip
    if len(lead) > 1:
        # Bytes, and a number for each row: little to copy.
        sizes = op("Shape", x, out=(len(lead),), of="int64", start=0, end=len(lead))
        unsigned = op(
            "Reshape", unsigned, op("Concat", sizes, g.integers(inputs), out=(len(lead) + 1,), of="int64", axis=0),
            out=(*lead, inputs), of="uint8",
        )  # fmt: skip
        step = op("Reshape", step, sizes, out=lead)
    step = op("Unsqueeze", step, g.integers(-1), out=(*lead, 1))
    made = []
    for (codes, scales), shape in zip(matrices, shapes, strict=True):
        # What changes codes for processors without VNNI changes this too. Without one ONNX Runtime 1.24 ends the
        # process there, and graphs with one for several matrices do not load.
        symmetric = g.constant_here(np.array(0, np.int8), f"{codes.name}.zero")
        y = g.op(
            "MatMulIntegerToFloat", unsigned, codes, g.number(1.0, "fp32"), scales, zero, symmetric,
            shape=shape, dtype="fp32", name=path, domain=MICROSOFT,
        )  # fmt: skip
        made.append(op("Mul", y, step, out=shape))
    return made


def outer_products() -> ir.Model:
    """Return a graph that sums the outer products of rows: ``left``ᵀ ``right``, in fp32.

    ``left`` uint8 [rows, A], with the zero point 128, and ``right`` int8 [rows, B] have a step for each column,
    ``left_step`` float32 [A, 1] and ``right_step`` [B]; ``result`` is [A, B].
    """
    g = Builder(target=HERE, dtype="fp32", recipe=Uniform(None, None, None), layers=0, name="outer_products")
    left, right = g.input("left", "uint8", ("rows", "a")), g.input("right", "int8", ("rows", "b"))
    left_step, right_step = g.input("left_step", "fp32", ("a", 1)), g.input("right_step", "fp32", ("b",))
    turned = g.op("Transpose", left, shape=("a", "rows"), dtype="uint8", name="/outer", perm=(1, 0))
    zero = g.constant(np.array(_ZERO, np.uint8), f"uint8/{_ZERO}")
    y = g.op(
        "MatMulIntegerToFloat", turned, right, g.number(1.0, "fp32"), right_step, zero,
        shape=("a", "b"), dtype="fp32", name="/outer", domain=MICROSOFT,
    )  # fmt: skip
    g.output(g.op("Mul", y, left_step, shape=("a", "b"), name="/outer"), "result", ("a", "b"))
    return g.model({}, "")


def paired_products(matrix: Columns, other: Columns, change: Columns) -> ir.Model:
    """Return a graph that multiplies what two models have, which differ little, by their matrices.

    Each is given as codes int8 [in, out] with scales float32 [out]. ``x`` float32 [rows, in] is multiplied by
    ``matrix`` and gives ``result`` [rows, out]; ``other_x``, what the other model has, by ``other`` and gives
    ``other_result``. ``change`` is other minus matrix, rounded by itself.

    Each factor is rounded to 8 bits. What both models have in common is rounded once, so that it cancels out in
    the difference of the results: that is other (other_x - x) + change x, exact to 8 bits, too.
    """
    g = Builder(target=HERE, dtype="fp32", recipe=Uniform(None, None, None), layers=0, name="paired_products")
    inputs, outputs = matrix[0].shape
    flat, out = ("rows", inputs), ("rows", outputs)
    x, other_x = g.input("x", "fp32", flat), g.input("other_x", "fp32", flat)

    def products(of: Value, path: str, **matrices: Columns) -> list[Value]:
        given = [
            (g.constant(codes, name), g.constant(scales, f"{name}_scale"))
            for name, (codes, scales) in matrices.items()
        ]
        return integer_products(g, of, of, given, inputs=inputs, shapes=[out] * len(given), path=path)

    y, changed = products(x, "/x", matrix=matrix, change=change)
    difference = g.op("Sub", other_x, x, shape=flat, name="/difference")
    [moved] = products(difference, "/difference", other=other)
    other_y = g.op("Add", y, g.op("Add", changed, moved, shape=out, name="/other"), shape=out, name="/other")
    g.output(y, "result", out)
    g.output(other_y, "other_result", out)
    return g.model({}, "")
