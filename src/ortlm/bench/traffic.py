"""What one decoded token has to read, and how much a token has to compute: read from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ortlm.artifact import Graph
from ortlm.errors import BadArtifact

# Where the weight stands among the inputs of operators that multiply by a matrix.
_WEIGHT_INPUT = {
    "MatMulNBits": 1,
    "MatMul": 1,
    "Gemm": 1,
    "MatMulInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulIntegerToFloat": 1,
    "QLinearMatMul": 3,
    # Gate and up; down is looked at with them.
    "QMoE": 2,
    "MoE": 2,
}
# The operators of mixtures of experts, and where the second matrices stand.
_EXPERTS = {"QMoE": 5, "MoE": 4}
# Metadata of products that compute a part of the tokens only, as experts do.
_SHARE = "ortlm.share"
# What may stand between a stored weight and its product; ONNX Runtime folds or fuses all of them.
_TRANSPARENT = (
    "Transpose", "Cast", "Reshape", "DequantizeLinear", "Identity",
    # Codes that are widened at loading.
    "BitwiseOr", "Concat", "BitwiseAnd", "BitShift", "Slice",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Product:
    """One product with a stored matrix of K x N weights.

    ``packed_bytes`` is what ONNX Runtime keeps of it in memory, and thus reads for each step, on a CPU.
    ``kept_only``: a prompt is multiplied at the positions only whose logits are asked for.
    """

    name: str
    operator: str
    weights: int
    packed_bytes: int
    kept_only: bool


@dataclass(frozen=True, slots=True)
class Traffic:
    """All products of a graph. Multiplications are pairs of a multiplication and an addition."""

    products: tuple[Product, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales that a decoding step reads, whatever the batch."""
        return sum(product.packed_bytes for product in self.products)

    @property
    def multiplications(self) -> int:
        """Multiplications with weights for one decoded token."""
        return sum(product.weights for product in self.products)

    def prompt_multiplications(self, tokens: int) -> int:
        """Return the multiplications with weights for a prompt whose last logits are asked for."""
        return sum(p.weights * (1 if p.kept_only else tokens) for p in self.products)


def read_traffic(path: Path, graph: Graph) -> Traffic:
    """Return what the ONNX file ``path`` reads and computes; its weights themselves are not read.

    Lookups of embeddings, norms and attention are left out. Raises BadArtifact if it is no ONNX file.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf has an error class of its own for each of its implementations
        raise BadArtifact(f"{path} cannot be read as an ONNX file: {error}") from error
    nodes = list(model.graph.all_nodes())
    kept = _of_kept_positions(model, graph)
    found = []
    for node in nodes:
        if node.graph is not None and (node.graph.name or "").endswith("/then_branch"):
            continue  # what is for prompts alone; the other branch has the same product
        weight = _weight(node)
        if weight is not None:
            share = float(node.metadata_props.get(_SHARE, 1.0))
            count, packed = (round(share * size) for size in _sizes(node, weight))
            found.append(Product(node.name or "", node.op_type, count, packed, node in kept))
    return Traffic(tuple(found))


def cache_bytes(states: Iterable[Sequence[int | None]], positions: float) -> int:
    """Return how many bytes of cache one row reads at a length of ``positions``.

    ``states`` are pairs of the bytes of one position and the window, None for all positions.
    """
    total = sum((size or 0) * min(positions, window or positions) for size, window in states)
    return int(total)


def packed_bits(bits: int, block: int, *, level: int, zero_points: bool) -> float:
    """Return the bits for each weight that MatMulNBits of ONNX Runtime reads on x86.

    Its int8 kernel (``level`` 4) keeps a float32 scale and a float32 sum with each block, symmetric or not. Its
    float kernel for 4 bits keeps codes, scales and zero points. Other widths have no float kernel: every call
    reads the codes, and writes and reads a float32 matrix.
    """
    if level == 4:
        return bits + 64 / block
    stored = bits + (32 + (bits if zero_points else 0)) / block
    return stored if bits == 4 else stored + 64


def _weight(node: ir.Node) -> ir.Value | None:
    """Return the stored matrix that ``node`` multiplies by, None if it does not."""
    at = _WEIGHT_INPUT.get(node.op_type)
    if at is None or at >= len(node.inputs):
        return None
    value = node.inputs[at]
    while value is not None and not value.is_initializer():
        maker = value.producer()
        if maker is None or maker.op_type not in _TRANSPARENT or not maker.inputs:
            return None
        value = maker.inputs[0]
    # What a graph lets a caller replace, such as the matrices of an adapter, is empty unless it is given.
    if value is None or value.is_graph_input() or value.const_value is None:
        return None
    return value if len(value.const_value.shape) >= 2 else None


def _sizes(node: ir.Node, weight: ir.Value) -> tuple[int, int]:
    """Return the weights of a product, and the bytes that are read for them."""
    stored = weight.const_value
    assert stored is not None
    if node.op_type in _EXPERTS:
        return _expert_sizes(node)
    if node.op_type != "MatMulNBits":
        return math.prod(stored.shape.numpy()), int(stored.nbytes)
    attributes = node.attributes
    k, n, block = (attributes[key].as_int() for key in ("K", "N", "block_size"))
    bits, level = (
        attributes[key].as_int() if key in attributes else default
        for key, default in (("bits", 4), ("accuracy_level", 0))
    )
    padded = math.ceil(k / block) * block * n
    zero_points = len(node.inputs) > 3 and node.inputs[3] is not None
    per_weight = packed_bits(bits, block, level=level, zero_points=zero_points)
    return k * n, round(padded * per_weight / 8)


def _expert_sizes(node: ir.Node) -> tuple[int, int]:
    """Return the same of the experts that compute one token; rows of a batch that choose others read more."""
    attributes = node.attributes
    shapes = [
        value.shape.numpy()
        for value in (node.inputs[_WEIGHT_INPUT[node.op_type]], node.inputs[_EXPERTS[node.op_type]])
        if value is not None and value.shape is not None
    ]
    stored = sum(map(math.prod, shapes)) * attributes["k"].as_int() // shapes[0][0]
    if node.op_type == "MoE":
        return stored, 4 * stored
    bits, block = attributes["expert_weight_bits"].as_int(), attributes["block_size"].as_int()
    level = attributes["accuracy_level"].as_int() if "accuracy_level" in attributes else 0
    weights = stored * 8 // bits
    zero_points = len(node.inputs) > 11 and node.inputs[11] is not None
    # Only 4 bits have a kernel for activations in fp32.
    per_weight = packed_bits(bits, block, level=level if bits == 4 else 4, zero_points=zero_points)
    return weights, round(weights * per_weight / 8)


def _of_kept_positions(model: ir.Model, graph: Graph) -> set[ir.Node]:
    """Return the nodes that a prompt passes at the positions only whose logits are asked for."""
    keep = graph.optional.get("logits_to_keep")
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    found: set[ir.Node] = set()
    if keep in values:
        waiting = [values[keep]]
        while waiting:
            for node, _ in waiting.pop().uses():
                if node not in found:
                    found.add(node)
                    waiting += node.outputs
        return found
    logits = next((v for v in model.graph.outputs if v.name == graph.outputs.get("logits")), None)
    if logits is None or logits.shape is None or len(logits.shape) < 2 or logits.shape[1] != 1:
        return found
    # A graph that gives one row of logits cuts right before its head.
    maker = logits.producer()
    while maker is not None:
        found.add(maker)
        if _weight(maker) is not None or not maker.inputs or maker.inputs[0] is None:
            break
        maker = maker.inputs[0].producer()
    return found
