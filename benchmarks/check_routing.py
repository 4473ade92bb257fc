"""Say whether a mixture of experts differs from its own rounded weights by other experts or by other numbers.

    python benchmarks/make_checkpoint.py Phi-3.5-MoE/config.json CHECKPOINT --layers 1
    ortlm build -i CHECKPOINT -o ARTIFACT --recipe fast --no-check
    python benchmarks/check_routing.py CHECKPOINT ARTIFACT

The reference is the checkpoint with every matrix rounded as the recipe says, computed in fp32 with each expert
apart. For the worst tokens it prints the relative error of the logits and whether both chose the same experts in
all layers. Then the artifact is run again with the reference's router logits in place of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare, weights_of
from ortlm.builder.request import BuildRequest
from ortlm.graph.weight_plan import Quantized
from ortlm.layerwise.model import LayerwiseModel
from ortlm.quant.rtn import dequantize, rtn


class Rounded:
    """The checkpoint with the recipe's rounded weights; keeps what the routers say."""

    def __init__(self, checkpoint: Path) -> None:
        prepared = prepare(BuildRequest(checkpoint, options=BuildOptions(recipe="fast")))
        plan = prepared.emitted.builder.plan
        self._items = {
            name: item for item in plan.items if isinstance(item, Quantized) for name in item.parameters
        }
        self._weights = weights_of(prepared, rotated=False)
        self.spec = self._weights.spec
        self.routers: list[Any] = []

    def weight(self, names: tuple[str, ...], weight: Any) -> Any:
        """Return a matrix [out, in] with its rows rounded."""
        item = self._items.get(names[0])
        if item is None:
            return weight
        return dequantize(rtn(weight, item.scheme), item.scheme, weight.shape[1])

    def __call__(self, product: Any, inputs: list[Any], floats: Any, weight: Any) -> Any:
        """Return the matrix to compute with; see ``layerwise.model.Change``."""
        if ".router." in product.parameters[0]:
            self.routers.append(inputs[0][0] @ weight.T)
        return self.weight(product.parameters, weight)

    def logits(self, ids: Any) -> Any:
        """Return the logits [S, V] after each of ``ids``."""
        model = LayerwiseModel(self._weights)
        states = model.embed([ids], lambda found: self.weight(("embed.weight",), found))
        for index in range(len(self.spec.layers)):
            states, _ = model.layer(index, states, self)
        [x] = model.head_inputs(states)
        rows = self._weights.stack(["head.weight"])
        step = 4096
        parts = [
            x[0] @ self.weight(("head.weight",), rows.rows(a, min(a + step, rows.count))).T
            for a in range(0, rows.count, step)
        ]
        model.close()
        return np.concatenate(parts, axis=1)


def run(artifact: Path, ids: Any, forced: list[Any] | None) -> tuple[Any, list[Any]]:
    """Return logits [S, V] and router logits of each layer; ``forced`` takes the place of the latter."""
    model = ir.load(artifact / "model.onnx")
    routers = [n for n in model.graph if n.op_type == "MatMul" and "/router/" in str(n.name)]
    feeds: dict[str, Any] = {}
    for at, node in enumerate(routers):
        value = node.outputs[0]
        model.graph.outputs.append(value)
        if forced is not None:
            given = ir.Value(name=f"forced.{at}", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
            model.graph.inputs.append(given)
            for use in list(value.uses()):
                use.node.replace_input_with(use.idx, given)
            feeds[f"forced.{at}"] = forced[at][None]
    with tempfile.TemporaryDirectory(dir=artifact.parent) as folder:
        for file in artifact.glob("model.onnx.*"):
            os.link(file, Path(folder) / file.name)
        ir.save(model, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), providers=["CPUExecutionProvider"]
        )
    count = len(ids)
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    feeds |= {"input_ids": ids[None], "attention_mask": np.ones((1, count), np.int64)}
    feeds["num_logits_to_keep"] = np.array(0, np.int64)
    names = ["logits", *(str(node.outputs[0].name) for node in routers)]
    logits, *found = session.run(names, feeds)
    return logits[0], [each[0] for each in found]


def chosen(logits: Any, eps: float) -> Any:
    """Return the two experts that the sparse mixer takes for each row, and what each is weighed against."""
    first = logits.argmax(axis=1)
    masked = logits.copy()
    masked[np.arange(len(logits)), first] = -np.inf
    second = masked.argmax(axis=1)
    sets = []
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        x = logits[row]
        near = [(x[best] - x) / np.maximum(np.abs(x), x[best]) <= 2 * eps for best in (a, b)]
        sets.append((int(a), int(b), near[0].tobytes(), (near[1] & (np.arange(len(x)) != a)).tobytes()))
    return sets


def main() -> int:
    """Compare, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reference = Rounded(args.checkpoint)
    vocab = reference.spec.vocab
    ids = np.random.default_rng(0).integers(3, vocab, args.tokens)
    want = reference.logits(ids)
    got, routers = run(args.artifact, ids, None)
    forced, _ = run(args.artifact, ids, reference.routers)
    eps = [getattr(layer.ffn, "mixer_eps", 0.0) for layer in reference.spec.layers]
    pairs = list(zip(reference.routers, routers, eps, strict=True))
    same = np.ones(args.tokens, bool)
    top = np.ones(args.tokens, bool)
    for ours, theirs, limit in pairs:
        a, b = chosen(ours, limit), chosen(theirs, limit)
        same &= np.array([x == y for x, y in zip(a, b, strict=True)])
        top &= np.array([x[:2] == y[:2] for x, y in zip(a, b, strict=True)])

    def error(found: Any) -> Any:
        return np.linalg.norm(found - want, axis=1) / np.linalg.norm(want, axis=1)

    plain, set_right = error(got), error(forced)
    for row in np.argsort(-plain)[:8]:
        how = "same experts and weights" if same[row] else "other weights" if top[row] else "other experts"
        print(f"token {row}: {plain[row]:.3f} off, {how}; with the reference's routing {set_right[row]:.3f}")
    found = {
        "tokens": args.tokens,
        "routed_alike": int(same.sum()),
        "largest_error_routed_alike": float(plain[same].max()),
        "largest_error_routed_otherwise": float(plain[~same].max()) if (~same).any() else None,
        "largest_error_with_routing_forced": float(set_right.max()),
        "router_logits_error": float(
            max(
                np.abs(a - b).max() / np.abs(a).max() for a, b in zip(reference.routers, routers, strict=True)
            )
        ),
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
