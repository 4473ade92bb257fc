"""Linear maps and embeddings, in whichever form the recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ortlm.graph.builder import MICROSOFT, Builder, Shape, Value
from ortlm.graph.integer_matmul import as_rows, integer_products
from ortlm.graph.lora import add_lora, is_adapted
from ortlm.graph.stored_codes import StoredCodes, stored_codes
from ortlm.quant.algorithms import CALIBRATED
from ortlm.quant.scheme import BLOCKS, Scheme
from ortlm.spec import Decoder, Parameter

Parameters = Mapping[str, Parameter]

# The first ONNX Runtime whose GatherBlockQuantized is right for 2 bits, and for 4 with a padded zero point.
_NARROW_LOOKUP = (1, 27)
# The operators of the vocabulary, as recipes know them.
_HEAD, _LOOKUP = "/lm_head/MatMul", "/model/embed_tokens/Gather"


def linear(
    g: Builder,
    x: Value,
    names: Sequence[str],
    *,
    parameters: Parameters,
    module: str,
    shape: Shape,
    layer: int | None = None,
    apart: bool = False,
) -> list[Value]:
    """Multiply ``x`` [B, S, in] by the matrices ``names`` ([out, in] each), as one product.

    Returns one value [B, S, sum of out], or a value [B, S, out] for each of ``names`` if they are wanted
    ``apart``. ``module`` is the operator's name, "layers.0.attn.qkv_proj" for example. Biases are added if they
    exist, and what an adapter adds.
    """
    weights = [parameters[f"{name}.weight"] for name in names]
    biases = [parameters[f"{name}.bias"] for name in names if f"{name}.bias" in parameters]
    path = node_path(module)
    rows = sum(p.shape[0] for p in weights)
    out = (*shape[:-1], rows)
    scheme = g.scheme(weights, f"{path}/MatMul", layer)
    if scheme is None:
        y = g.product(x, weights, f"{module}.weight", shape=out, path=path)
    else:
        # What is added to a product is added to all of it at once.
        ready = apart and not biases and not is_adapted(g, weights)
        results = _quantized_product(g, x, weights, scheme, module=module, out=out, path=path, apart=ready)
        if len(results) > 1:
            return results
        [y] = results
    if biases:
        y = g.op("Add", y, g.vector(biases, f"{module}.bias"), shape=out, name=path)
    # After the bias, which ONNX Runtime makes a part of the quantized product: the base then stays the same.
    y = add_lora(g, x, y, weights, module=module, path=path, shape=shape)
    return _split(g, y, weights, out, path) if apart else [y]


def _split(g: Builder, y: Value, weights: Sequence[Parameter], shape: Shape, path: str) -> list[Value]:
    sizes = [p.shape[0] for p in weights]
    outputs = [(g.dtype, (*shape[:-1], size)) for size in sizes]
    return g.ops("Split", [y, g.integers(*sizes)], outputs=outputs, name=path, attributes={"axis": -1})


def node_path(module: str) -> str:
    """Return the node name prefix of ``module``; the same as onnxruntime-genai's builder gives it."""
    return "/" + module.replace("layers.", "layers#").replace(".", "/").replace("layers#", "model/layers.")


def _quantized_product(
    g: Builder,
    x: Value,
    weights: Sequence[Parameter],
    scheme: Scheme,
    *,
    module: str,
    out: Shape,
    path: str,
    apart: bool,
) -> list[Value]:
    inputs = weights[0].shape[1]
    role = weights[0].role
    if g.integer_only or (g.fast_prompts and role == "vision"):
        # Images are always many rows: there is nothing to choose between.
        rows = as_rows(g, x, inputs, path)
        columns = g.columns(weights, module)
        return integer_products(g, x, rows, [columns], inputs=inputs, shapes=[out], path=path)
    matrix = stored_codes(g, weights, module, scheme)
    g.stored_for[f"{module}.codes"] = f"{path}/MatMul"

    def packed() -> Value:
        return matmul_nbits(g, x, matrix, scheme=scheme, inputs=inputs, out=out, path=path)

    # The head is for the last rows of a prompt only.
    if g.many is None or role == "head":
        return [packed()]
    rows = as_rows(g, x, inputs, path)
    # Integer matmuls write each part where it is read, and so save a copy of it.
    parts = (
        [(f"{module}.{i}", [weight]) for i, weight in enumerate(weights)] if apart else [(module, weights)]
    )
    shapes = [(*out[:-1], sum(p.shape[0] for p in part)) for _, part in parts]

    def many() -> list[Value]:
        matrices = [g.columns(part, name) for name, part in parts]
        return integer_products(g, x, rows, matrices, inputs=inputs, shapes=shapes, path=path)

    def few() -> list[Value]:
        return _split(g, packed(), weights, out, path) if apart else [packed()]

    return g.choose(g.many, many, few, shapes=shapes, name=path)


def matmul_nbits(
    g: Builder,
    x: Value,
    matrix: StoredCodes,
    *,
    scheme: Scheme,
    inputs: int,
    out: Shape,
    path: str,
) -> Value:
    """Multiply ``x`` [..., in] by the quantized ``matrix`` [out, in]; the result has shape ``out``."""
    return g.op(
        "MatMulNBits",
        x,
        matrix.codes,
        matrix.scales,
        matrix.zeros,
        shape=out,
        name=path,
        domain=MICROSOFT,
        K=inputs,
        N=int(out[-1]),
        bits=scheme.kernel_bits,
        block_size=scheme.block,
        accuracy_level=scheme.accuracy_level,
    )


class Vocabulary:
    """The embedding table and the head, which may be one matrix that is stored once.

    A graph may have only one of the two: without ``embed`` or without ``head``.
    """

    def __init__(
        self, g: Builder, spec: Decoder, parameters: Parameters, *, embed: bool = True, head: bool = True
    ) -> None:
        self._g, self._spec, self._parameters = g, spec, parameters
        self._embed = parameters["embed.weight"]
        head_scheme = g.scheme([self._embed], _HEAD, None, role="head")
        embed_scheme = g.scheme([self._embed], _LOOKUP, None)
        if spec.tied_head and head_scheme is not None and head_scheme.algorithm in CALIBRATED:
            # What is looked up as well must not lean on what the head alone is multiplied by.
            head_scheme = replace(head_scheme, algorithm="rtn")
        if spec.tied_head and embed_scheme is not None and head_scheme is not None:
            # One matrix serves both, so both take the head's scheme: the head decides the quality.
            embed_scheme = head_scheme = _dividing(head_scheme, spec.hidden) or head_scheme
        self._scheme = _dividing(embed_scheme, spec.hidden)
        self._shared = spec.tied_head and self._scheme == head_scheme
        self._head_scheme = head_scheme
        self._matrix: StoredCodes | None = None
        matmul = self._shared and head and not g.integer_only
        if self._scheme is not None and (embed or matmul):
            self._matrix = stored_codes(
                g, [self._embed], "embed_tokens", self._scheme, gather=embed, matmul=matmul
            )
            # One that serves both is the head's.
            node = _HEAD if self._shared else _LOOKUP
            g.stored_for |= {"embed_tokens.codes": node, "embed_tokens.rows": node}

    def embed(self, ids: Value, shape: Shape) -> Value:
        """Return the embeddings [B, S, H] of token ``ids`` int64 [B, S]."""
        return _rows(
            self._g, ids, self._embed, self._matrix,
            scheme=self._scheme, name="embed_tokens", shape=shape, path="/model/embed_tokens",
        )  # fmt: skip

    def head(self, x: Value, shape: Shape) -> Value:
        """Return logits [B, n, V] of hidden states ``x`` [B, n, H]."""
        g, spec, path = self._g, self._spec, "/lm_head"
        out = (*shape[:-1], spec.vocab)
        if not spec.tied_head:
            [y] = linear(g, x, ["head"], parameters=self._parameters, module="lm_head", shape=shape)
            return y
        if self._head_scheme is not None and g.integer_only:
            columns = g.columns([self._embed], "lm_head")
            rows = as_rows(g, x, spec.hidden, path)
            [y] = integer_products(g, x, rows, [columns], inputs=spec.hidden, shapes=[out], path=path)
        elif self._head_scheme is not None:
            matrix = self._matrix
            if matrix is None or not self._shared:
                matrix = stored_codes(g, [self._embed], "lm_head", self._head_scheme)
                g.stored_for["lm_head.codes"] = _HEAD
            y = matmul_nbits(
                g, x, matrix,
                scheme=self._head_scheme, inputs=spec.hidden, out=out, path=path,
            )  # fmt: skip
        else:
            # Gemm reads the [V, H] table as it lies; MatMul would need a second, transposed copy.
            table = g.matrix([self._embed], "embed_tokens.weight", transposed=False)
            flat = g.op("Reshape", x, g.integers(-1, spec.hidden), shape=("rows", spec.hidden), name=path)
            flat = g.op("Gemm", flat, table, shape=("rows", spec.vocab), name=path, transB=1)
            lead = g.op("Shape", x, shape=(2,), dtype="int64", name=path, start=0, end=2)
            sizes = g.op("Concat", lead, g.integers(spec.vocab), shape=(3,), dtype="int64", name=path, axis=0)
            y = g.op("Reshape", flat, sizes, shape=out, name=path)
        if "head.bias" in self._parameters:
            y = g.op("Add", y, g.weight(self._parameters["head.bias"]), shape=out, name=path)
        # An adapter may change the head alone, though the weights are tied.
        head = Parameter("head", "weight", self._embed.shape, "head")
        return add_lora(g, x, y, [head], module="lm_head", path=path, shape=shape)


def looked_up(
    g: Builder, ids: Value, table: Parameter, *, within: int, module: str, shape: Shape, path: str
) -> Value:
    """Return the rows [B, S, n] of ``table`` [V, n] for ``ids`` int64 [B, S].

    ``within`` is a number of columns, which divides n, whose multiples no block of codes crosses.
    """
    scheme = _dividing(g.scheme([table], f"{path}/Gather", None), within)
    matrix = None if scheme is None else stored_codes(g, [table], module, scheme, gather=True, matmul=False)
    return _rows(g, ids, table, matrix, scheme=scheme, name=module, shape=shape, path=path)


def _rows(
    g: Builder,
    ids: Value,
    table: Parameter,
    matrix: StoredCodes | None,
    *,
    scheme: Scheme | None,
    name: str,
    shape: Shape,
    path: str,
) -> Value:
    """Return the rows of ``table`` for ``ids``; it is float unless it is stored as ``matrix``."""
    if scheme is None or matrix is None:
        floats = g.matrix([table], f"{name}.weight", transposed=False)
        return g.op("Gather", floats, ids, shape=shape, name=path, axis=0)
    if not g.target.block_lookup:
        return _dequantized_rows(g, ids, matrix, scheme=scheme, shape=shape, path=path)
    # Older ones refuse 2 bits; an odd number of zero points of 4 bits they read as if rows were not padded,
    # and say nothing.
    odd = matrix.zeros is not None and scheme.blocks(table.shape[1]) % 2
    if scheme.bits == 2 or (scheme.kernel_bits == 4 and odd):
        g.need(_NARROW_LOOKUP)
    return g.op(
        "GatherBlockQuantized",
        matrix.rows,
        ids,
        matrix.scales,
        matrix.zeros,
        shape=shape,
        name=path,
        domain=MICROSOFT,
        bits=scheme.kernel_bits,
        block_size=scheme.block,
        gather_axis=0,
        quantize_axis=1,
    )


def _dequantized_rows(
    g: Builder,
    ids: Value,
    matrix: StoredCodes,
    *,
    scheme: Scheme,
    shape: Shape,
    path: str,
) -> Value:
    """Return what GatherBlockQuantized gives for ``ids``, float [B, S, H], by operators that every provider has.

    ``matrix`` is stored as it wants it.
    """
    lead, inputs = tuple(shape[:-1]), int(shape[-1])
    blocks = scheme.blocks(inputs)
    apart = (*lead, blocks, scheme.block)

    def codes(packed: Value | None, count: int) -> Value:
        width = -(-count * scheme.kernel_bits // 8)
        x = g.op("Gather", packed, ids, shape=(*lead, width), dtype="uint8", name=path, axis=0)
        if scheme.kernel_bits == 4:
            pair = (*lead, width, 1)
            low = g.op(
                "BitwiseAnd", x, g.integer(15, "uint8"), shape=(*lead, width), dtype="uint8", name=path
            )
            high = g.op(
                "BitShift", x, g.integer(4, "uint8"),
                shape=(*lead, width), dtype="uint8", name=path, direction="RIGHT",
            )  # fmt: skip
            both = [
                g.op("Unsqueeze", half, g.integers(-1), shape=pair, dtype="uint8", name=path)
                for half in (low, high)
            ]
            x = g.op("Concat", *both, shape=(*lead, width, 2), dtype="uint8", name=path, axis=-1)
            x = g.op(
                "Reshape", x, g.integers(0, 0, 2 * width), shape=(*lead, 2 * width), dtype="uint8", name=path
            )
            if count < 2 * width:
                x = g.op(
                    "Slice", x, g.integers(0), g.integers(count), g.integers(2),
                    shape=(*lead, count), dtype="uint8", name=path,
                )  # fmt: skip
        return g.cast(x, g.dtype, (*lead, count), path)

    x = g.op(
        "Reshape", codes(matrix.rows, inputs), g.integers(0, 0, blocks, scheme.block), shape=apart, name=path
    )
    zero: Value = g.number(float(scheme.zero))
    if matrix.zeros is not None:
        zero = g.op(
            "Unsqueeze", codes(matrix.zeros, blocks), g.integers(-1), shape=(*lead, blocks, 1), name=path
        )
    x = g.op("Sub", x, zero, shape=apart, name=path)
    scale = g.op("Gather", matrix.scales, ids, shape=(*lead, blocks), name=path, axis=0)
    scale = g.op("Unsqueeze", scale, g.integers(-1), shape=(*lead, blocks, 1), name=path)
    x = g.op("Mul", x, scale, shape=apart, name=path)
    return g.op("Reshape", x, g.integers(0, 0, inputs), shape=shape, name=path)


def _dividing(scheme: Scheme | None, inputs: int) -> Scheme | None:
    """Return ``scheme`` with the largest block that divides ``inputs``: a lookup knows no padding."""
    if scheme is None:
        return None
    blocks = [b for b in BLOCKS if b <= scheme.block and inputs % b == 0]
    return replace(scheme, block=max(blocks)) if blocks else None
