"""Quantized matrices as the kernels take them.

Kernels know codes of 2, 4 and 8 bits, and scales of the activations' type. Codes of 3, 5 and 6 bits, and fp16
scales next to fp32 activations, are widened by operators on initializers, which ONNX Runtime computes once: when
it loads the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ortlm.graph.builder import Builder, Value
from ortlm.quant.scheme import Scheme
from ortlm.spec import Experts, Parameter


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A quantized matrix [out, in].

    ``codes`` [out, blocks, bytes] is for a product, ``rows`` [out, bytes] for a lookup; each is None if it was not
    asked for. ``scales`` [out, blocks] are as activations, ``zeros`` packed, None if they are in the middle.
    Of experts, all have one axis more, before the others, and ``codes`` are [experts, out, bytes].
    """

    codes: Value | None
    rows: Value | None
    scales: Value
    zeros: Value | None


def stored_codes(
    g: Builder,
    parameters: Sequence[Parameter],
    name: str,
    scheme: Scheme,
    *,
    gather: bool = False,
    matmul: bool = True,
    of: Experts | None = None,
    interleaved: int = 1,
    share: float = 1.0,
) -> StoredCodes:
    """Return the matrix that ``parameters`` make, one below the other, for a lookup, a product or both.

    ``of``, ``interleaved`` and ``share`` are those of ``Builder.quantized``.
    """
    codes, rows, scales, zeros = g.quantized(
        parameters, name, scheme, gather=gather, matmul=matmul, of=of, interleaved=interleaved, share=share
    )
    path = f"/{name}"
    out, inputs = sum(p.shape[0] for p in parameters), parameters[0].shape[1]
    width, blocks = scheme.blocks(inputs) * scheme.block, scheme.blocks(inputs)
    lead = (out,) if of is None else (of.experts, out // of.experts)
    if g.dtype == "fp32" and scheme.scales != "fp32":
        scales = g.cast(scales, g.dtype, (*lead, blocks), f"{path}.scales")
    if scheme.kernel_bits == scheme.bits:
        return StoredCodes(codes, rows, scales, zeros)
    packed = codes if codes is not None else rows
    assert packed is not None
    if scheme.bits == 3:
        wide = _spread(
            g, _widened(g, packed, f"{path}.codes", out, width // 2, 6), f"{path}.codes", out, width // 2
        )
    else:
        wide = _widened(g, packed, f"{path}.codes", out, width, scheme.bits)
    if zeros is None:
        # The kernels' own middle is that of their own bits.
        count, zero = -(-blocks * scheme.kernel_bits // 8), scheme.zero
        zeros = g.op(
            "Expand",
            g.integer(zero * 17 if scheme.kernel_bits == 4 else zero, "uint8"),
            g.integers(*lead, count),
            shape=(*lead, count),
            dtype="uint8",
            name=f"{path}.zeros",
        )
    inner = scheme.block * scheme.kernel_bits // 8
    shape = (*lead, blocks, inner) if of is None else (*lead, blocks * inner)
    return StoredCodes(
        codes=g.op(
            "Reshape", wide, g.integers(*shape), shape=shape, dtype="uint8", name=f"{path}.codes",
        ) if matmul else None,
        rows=wide if gather else None,
        scales=scales,
        zeros=zeros,
    )  # fmt: skip


def _widened(g: Builder, packed: Value, path: str, out: int, width: int, bits: int) -> Value:
    """Return codes uint8 [out, width] of what ``quant.pack`` has packed into two planes."""
    low = width // 2
    planes = []
    for begin, end, size, shift in ((0, low, 4, 0), (low, low + width * (bits - 4) // 8, bits - 4, 4)):
        bounds = (g.integers(begin), g.integers(end), g.integers(1))
        plane = g.op("Slice", packed, *bounds, shape=(out, end - begin), dtype="uint8", name=path)
        parts = [_bits(g, plane, size * i, size, shift, (out, end - begin), path) for i in range(8 // size)]
        planes.append(g.op("Concat", *parts, shape=(out, width), dtype="uint8", name=path, axis=1))
    return g.op("BitwiseOr", *planes, shape=(out, width), dtype="uint8", name=path)


def _spread(g: Builder, pairs: Value, path: str, out: int, width: int) -> Value:
    """Return bytes uint8 [out, width] with a code of 3 bits in each half; ``pairs`` have two in a row."""
    halves = [_bits(g, pairs, start, 3, to, (out, width), path) for start, to in ((0, 0), (3, 4))]
    return g.op("BitwiseOr", *halves, shape=(out, width), dtype="uint8", name=path)


def _bits(
    g: Builder, plane: Value, start: int, size: int, to: int, shape: tuple[int, int], path: str
) -> Value:
    """Return ``size`` bits of each byte, from bit ``start`` on, moved to bit ``to``."""
    moved = plane
    if start != to:
        moved = g.op(
            "BitShift", plane, g.integer(abs(start - to), "uint8"), shape=shape, dtype="uint8", name=path,
            direction="RIGHT" if start > to else "LEFT",
        )  # fmt: skip
    mask = g.integer(((1 << size) - 1) << to, "uint8")
    return g.op("BitwiseAnd", moved, mask, shape=shape, dtype="uint8", name=path)
