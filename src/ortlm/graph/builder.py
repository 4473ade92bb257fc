"""A thin layer over onnx-ir: the rest of the code sees operators and values, not the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from ortlm.dtypes import BY_NAME, Array, dtype
from ortlm.graph.weight_plan import Columns, Initializer, Plain, Plan, Quantized
from ortlm.quant.algorithms import CALIBRATED
from ortlm.quant.recipe import MatrixLocation, Recipe
from ortlm.quant.scheme import Scheme
from ortlm.spec import Experts, Parameter
from ortlm.target import Target

Value = ir.Value
Dim = int | str
Shape = Sequence[Dim]
Attribute = int | float | str | Sequence[int]

MICROSOFT = "com.microsoft"
# 23 is the first operator set with RMSNormalization.
OPSET = 23
IR_VERSION = 10
# The first ONNX Runtime that knows this operator set and what every graph uses.
FIRST_ONNXRUNTIME = (1, 23)
# Metadata of a product that computes a part of the tokens only: which part, 0 to 1.
SHARE = "ortlm.share"
# onnx knows only its own operators; these are ONNX Runtime's.
_CONTRIB = frozenset(
    {
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "LinearAttention",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MoE",
        "MultiHeadAttention",
        "QMoE",
        "QuantizeLinear",
        "QuickGelu",
        "RotaryEmbedding",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)


@dataclass(frozen=True, slots=True)
class Product:
    """A product with float weights: which ``parameters`` it multiplies by, and where it stands.

    ``weight`` and ``value`` name its matrix and its other factor; ``node`` is its place in the order of nodes.
    """

    parameters: tuple[str, ...]
    weight: str
    value: str
    node: int


class Builder:
    """Collects the nodes, inputs and weights of one graph.

    ``name`` is the graph's. With ``fast_prompts``, products with many rows are of integers, see
    ``graph.integer_matmul``; with ``integer_only`` all are. ``dtype`` is the element type of activations.
    ``recipe`` decides how each matrix is stored; ``plan`` gathers what has to be written. ``adapted`` names the
    weights that get inputs for adapters. Every value carries its type and shape, since ONNX infers none through
    ONNX Runtime's own operators.
    """

    def __init__(
        self,
        *,
        target: Target,
        dtype: str,
        recipe: Recipe,
        layers: int,
        name: str = "decoder",
        fast_prompts: bool = False,
        integer_only: bool = False,
        adapted: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        self.target = target
        self.fast_prompts = fast_prompts
        self.integer_only = integer_only
        # Whether there are many tokens at once, bool []; None where nothing else comes.
        self.many: Value | None = None
        self.adapted = adapted
        self.dtype = dtype
        self.recipe = recipe
        self.layers = layers
        self.plan = Plan()
        self.asked: set[str] = set()
        self.products: list[Product] = []
        # Of quantized matrices: codes to the name of the operator that reads them, as recipes know it.
        self.stored_for: dict[str, str] = {}
        # Major and minor version of the first ONNX Runtime that loads what has been emitted.
        self.onnxruntime = FIRST_ONNXRUNTIME
        self.nodes: list[ir.Node] = []
        self._inputs: list[Value] = []
        self.outputs: list[Value] = []
        self._initializers: dict[str, Value] = {}
        # Those that lie in branches, and in the one that is being emitted.
        self._inside: list[tuple[ir.Graph, list[str]]] = []
        self._branch: list[str] | None = None
        self._used: dict[str, int] = {}

    # --- values -------------------------------------------------------------------------------------------

    def input(self, name: str, kind: str, shape: Shape) -> Value:
        """Declare a graph input of element type ``kind``."""
        value = _value(name, kind, shape)
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, default: Array, shape: Shape) -> Value:
        """Declare an input that may be left out: its default is an initializer of the same name."""
        value = _value(name, _name_of(default), shape)
        value.const_value = ir.tensor(default, name=name)
        self._inputs.append(value)
        self._initializers[name] = value
        return value

    def output(self, value: Value, name: str, shape: Shape) -> None:
        """Make ``value`` a graph output called ``name`` that is declared with ``shape``."""
        value.name = name
        value.shape = ir.Shape(shape)
        self.outputs.append(value)

    def constant(self, array: Array, name: str) -> Value:
        """Return a small constant; the same name stands for the same value."""
        if name not in self._initializers:
            value = _value(name, _name_of(array), array.shape)
            value.const_value = ir.tensor(array, name=name)
            self._initializers[name] = value
        return self._initializers[name]

    def constant_here(self, array: Array, name: str) -> Value:
        """Return a small constant of its own name, which lies in the branch that is being emitted, if one is."""
        self._lies_here(name)
        return self.constant(array, name)

    def integers(self, *numbers: int) -> Value:
        """Return the constant int64 vector of ``numbers``."""
        return self.constant(np.array(numbers, np.int64), "int64/" + "_".join(map(str, numbers)))

    def integer(self, number: int, kind: str = "int64") -> Value:
        """Return the constant scalar ``number``."""
        return self.constant(np.array(number, dtype(kind).numpy), f"{kind}/scalar_{number}")

    def number(self, number: float, kind: str | None = None) -> Value:
        """Return the constant scalar ``number`` in the element type of activations, or in ``kind``."""
        kind = kind or self.dtype
        return self.constant(np.array(number, np.float32).astype(dtype(kind).numpy), f"{kind}/{number!r}")

    def need(self, onnxruntime: tuple[int, int]) -> None:
        """Say that something emitted loads in this ONNX Runtime (major, minor) and later ones only."""
        self.onnxruntime = max(self.onnxruntime, onnxruntime)

    # --- operators ----------------------------------------------------------------------------------------

    def op(
        self,
        kind: str,
        *inputs: Value | None,
        shape: Shape,
        name: str,
        dtype: str | None = None,
        domain: str = "",
        **attributes: Attribute,
    ) -> Value:
        """Add a node with one output of ``shape`` and element type ``dtype`` (default: activations)."""
        return self.ops(
            kind,
            inputs,
            outputs=[(dtype or self.dtype, shape)],
            name=name,
            domain=domain,
            attributes=attributes,
        )[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        *,
        outputs: Sequence[tuple[str, Shape] | None],
        name: str,
        domain: str = "",
        attributes: Mapping[str, Attribute] | None = None,
    ) -> list[Value]:
        """Add a node with several outputs, each (element type, shape) or None if it is left out."""
        known = kind in _CONTRIB if domain == MICROSOFT else onnx.defs.has(kind, domain)
        if not known:
            raise AssertionError(f"there is no operator {domain or 'ai.onnx'}.{kind}; node {name}")
        name = self._unique(f"{name}/{kind}")
        values = [
            _value(name if i == 0 else f"{name}/{i}", *out) if out else Value(name="")
            for i, out in enumerate(outputs)
        ]
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        self.nodes.append(
            ir.node(kind, list(inputs), dict(attributes or {}), domain=domain, outputs=values, name=name)
        )
        return values

    def annotate(self, key: str, value: str) -> None:
        """Write metadata to the node that was added last."""
        self.nodes[-1].metadata_props[key] = value

    def choose(
        self,
        flag: Value,
        then: Callable[[], Sequence[Value]],
        other: Callable[[], Sequence[Value]],
        *,
        shapes: Sequence[Shape],
        name: str,
    ) -> list[Value]:
        """Return what ``then`` emits if the scalar ``flag`` is true, else what ``other`` does; only one is run.

        Both emit at least one node, and may use whatever was emitted before.
        """
        branches = {}
        for branch, emit in (("then_branch", then), ("else_branch", other)):
            inside: list[str] = []
            outside, self.nodes, self._branch = (self.nodes, self._branch), [], inside
            values = emit()
            graph = ir.Graph([], values, nodes=self.nodes, name=f"{name}/{branch}")
            branches[branch] = ir.AttrGraph(branch, graph)
            self._inside.append((graph, inside))
            self.nodes, self._branch = outside
        outputs = [_value(self._unique(f"{name}/If"), self.dtype, shape) for shape in shapes]
        self.nodes.append(ir.node("If", [flag], branches, outputs=outputs, name=str(outputs[0].name)))
        return outputs

    def cast(self, x: Value, kind: str, shape: Shape, name: str) -> Value:
        """Return ``x`` in element type ``kind``."""
        return self.op("Cast", x, shape=shape, name=name, dtype=kind, to=dtype(kind).onnx)

    # --- weights ------------------------------------------------------------------------------------------

    def weight(self, parameter: Parameter) -> Value:
        """Return the initializer for a float weight in the element type of activations."""
        return self._plain((parameter,), parameter.name, parameter.shape)

    def matrix(self, parameters: Sequence[Parameter], name: str, *, transposed: bool) -> Value:
        """Return float matrices [out, in] one below the other, as [in, out] if ``transposed``."""
        rows, inputs = sum(p.shape[0] for p in parameters), parameters[0].shape[1]
        shape = (inputs, rows) if transposed else (rows, inputs)
        return self._plain(parameters, name, shape, transposed=transposed)

    def product(
        self, x: Value, parameters: Sequence[Parameter], name: str, *, shape: Shape, path: str
    ) -> Value:
        """Multiply ``x`` [B, S, in] by float matrices [out, in] that lie one below the other."""
        w = self.matrix(parameters, name, transposed=True)
        names = tuple(p.name for p in parameters)
        self.products.append(Product(names, name, str(x.name), len(self.nodes)))
        return self.op("MatMul", x, w, shape=shape, name=path)

    def vector(self, parameters: Sequence[Parameter], name: str) -> Value:
        """Return vectors (biases) one after the other."""
        return self._plain(parameters, name, (sum(p.shape[0] for p in parameters),))

    def scheme(
        self, parameters: Sequence[Parameter], node: str, layer: int | None, *, role: str | None = None
    ) -> Scheme | None:
        """Ask the recipe how the matrix of operator ``node`` is stored; ``asked`` remembers the name.

        It is made of ``parameters``, whose role is another where one serves twice.
        """
        self.asked.add(node)
        role = role or parameters[0].role
        if role == "router":
            # Few numbers, which decide what all others are for.
            return None
        names, weights = tuple(p.name for p in parameters), sum(p.size for p in parameters)
        inputs = parameters[0].shape[-1]
        scheme = self.recipe(MatrixLocation(role, node, layer, self.layers, weights, inputs, names))
        if scheme is not None and role in ("vision", "per_layer_embed") and scheme.algorithm in CALIBRATED:
            # Calibration reads text, which the vision encoder's weights have no part in; and a table is looked up.
            scheme = replace(scheme, algorithm="rtn")
        return scheme

    def quantized(
        self,
        parameters: Sequence[Parameter],
        name: str,
        scheme: Scheme,
        *,
        gather: bool = False,
        matmul: bool = True,
        of: Experts | None = None,
        interleaved: int = 1,
        share: float = 1.0,
    ) -> tuple[Value | None, Value | None, Value, Value | None]:
        """Return initializers for a quantized matrix: codes for a product, codes for a lookup, scales, zeros.

        Both views of the codes, [out, blocks, bytes] and [out, row_bytes], show the same bytes in the file. With
        ``of`` it is the matrices of those experts, and all have one axis more, before the others; codes for a
        product are [experts, out, row_bytes] then. For ``interleaved`` and ``share`` see
        ``weight_plan.Quantized``.
        """
        rows, inputs = sum(p.shape[0] for p in parameters), parameters[0].shape[1]
        blocks, row = scheme.blocks(inputs), scheme.row_bytes(inputs)
        lead = (rows,) if of is None else (of.experts, rows // of.experts)
        views = []
        if scheme.kernel_bits != scheme.bits:
            # The planes of codes that have to be widened are not block by block.
            views.append(Initializer(f"{name}.codes", "uint8", (rows, row)))
        elif matmul:
            inner = (blocks, row // blocks) if of is None else (row,)
            views.append(Initializer(f"{name}.codes", "uint8", (*lead, *inner)))
        if gather and scheme.kernel_bits == scheme.bits:
            views.append(Initializer(f"{name}.rows", "uint8", (rows, row)))
        kind = self.dtype if self.dtype != "fp32" else scheme.scales
        scheme = replace(scheme, scales=kind)
        scales = Initializer(f"{name}.scales", kind, (*lead, blocks))
        zeros = (
            None
            if scheme.symmetric
            else Initializer(f"{name}.zeros", "uint8", (*lead, scheme.zero_row_bytes(inputs)))
        )
        item = Quantized(
            tuple(p.name for p in parameters), scheme, rows, inputs, tuple(views), scales, zeros,
            interleaved=interleaved, experts=of.experts if of else 1,
            share=of.top_k / of.experts if of else share,
        )  # fmt: skip
        self.plan.items.append(item)
        made = [self._initializer(t) for t in views]
        return (
            made[0] if matmul else None,
            made[-1] if gather else None,
            self._initializer(scales),
            self._initializer(zeros) if zeros else None,
        )

    def floats(
        self, parameters: Sequence[Parameter], name: str, shape: tuple[int, ...], *, interleaved: int = 1
    ) -> Value:
        """Return float weights one below the other, as ``shape``; ``interleaved`` is that of ``Plain``."""
        return self._plain(parameters, name, shape, interleaved=interleaved)

    def columns(self, parameters: Sequence[Parameter], name: str) -> tuple[Value, Value]:
        """Return initializers for a matrix in 8 bits by columns: codes int8 [in, out] and scales float32 [out].

        Within a branch the codes lie there. Processors without VNNI overflow on products of 8 bits unless ONNX
        Runtime stores the codes in another way, and it looks for them in the operator's own graph only.
        """
        rows, inputs = sum(p.shape[0] for p in parameters), parameters[0].shape[1]
        codes = Initializer(f"{name}.columns", "int8", (inputs, rows))
        scales = Initializer(f"{name}.column_scales", "fp32", (rows,))
        self.plan.items.append(Columns(tuple(p.name for p in parameters), rows, inputs, codes, scales))
        self._lies_here(codes.name)
        return self._initializer(codes), self._initializer(scales)

    def _plain(
        self,
        parameters: Sequence[Parameter],
        name: str,
        shape: tuple[int, ...],
        *,
        transposed: bool = False,
        interleaved: int = 1,
    ) -> Value:
        if name in self._initializers:
            return self._initializers[name]
        tensor = Initializer(name, self.dtype, shape)
        self.plan.items.append(Plain(tuple(p.name for p in parameters), tensor, transposed, interleaved))
        return self._initializer(tensor)

    def _lies_here(self, name: str) -> None:
        """Let the initializer ``name`` belong to the branch that is being emitted, if one is."""
        if self._branch is not None:
            self._branch.append(name)

    def _initializer(self, tensor: Initializer) -> Value:
        value = _value(tensor.name, tensor.dtype, tensor.shape)
        self._initializers[tensor.name] = value
        return value

    # --- the whole ----------------------------------------------------------------------------------------

    def model(self, placed: Mapping[str, tuple[str, int]], producer_version: str) -> ir.Model:
        """Return the finished model; ``placed`` says for each stored tensor (file, offset in bytes)."""
        for item in self.plan.items:
            for tensor in (*item.tensors, *(item.views[1:] if isinstance(item, Quantized) else ())):
                file, offset = placed[tensor.name]
                self._initializers[tensor.name].const_value = ir.ExternalTensor(
                    file,
                    offset,
                    tensor.bytes,
                    ir.DataType(dtype(tensor.dtype).onnx),
                    shape=ir.Shape(tensor.shape),
                    name=tensor.name,
                )
        for branch, names in self._inside:
            for name in names:
                branch.register_initializer(self._initializers[name])
        inside = {name for _, names in self._inside for name in names}
        graph = ir.Graph(
            self._inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=[value for name, value in self._initializers.items() if name not in inside],
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=self.name,
        )
        return ir.Model(
            graph, ir_version=IR_VERSION, producer_name="ortlm", producer_version=producer_version
        )

    def _unique(self, name: str) -> str:
        count = self._used.get(name, 0)
        self._used[name] = count + 1
        return f"{name}_{count}" if count else name


def _value(name: str, kind: str, shape: Shape) -> Value:
    return Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType(dtype(kind).onnx)))


def _name_of(array: Array) -> str:
    return next(d.name for d in BY_NAME.values() if d.numpy == array.dtype)
