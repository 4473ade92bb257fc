"""Token ids to embeddings, with those of images in the places that are theirs."""

from __future__ import annotations

from ortlm.graph.builder import Attribute, Builder, Value
from ortlm.graph.decoder import Emitted, embeddings
from ortlm.graph.linear import Parameters, Vocabulary
from ortlm.quant.recipe import Recipe
from ortlm.spec import Decoder, parameters
from ortlm.target import Target

_PATH = "/embedding"


def emit_embedding(spec: Decoder, *, token: int, target: Target, dtype: str, recipe: Recipe) -> Emitted:
    """Return the graph that makes ``inputs_embeds`` [B, S, H] of token ids and features of images.

    Inputs: ``input_ids`` int64 [B, S] and ``image_features`` [n, H]. Places whose id is negative take the
    features, one after the other, row by row; there must be no more than n of them, which may be 0. So do
    places whose id is ``token`` (-1 for none), as far as there are features for them.
    """
    g = Builder(target=target, dtype=dtype, recipe=recipe, layers=len(spec.layers), name="embedding")
    weights: Parameters = {p.name: p for p in parameters(spec)}
    lead: tuple[int | str, ...] = ("batch_size", "sequence_length")
    shape = (*lead, spec.hidden)
    ids = g.input("input_ids", "int64", lead)
    features = g.input("image_features", dtype, ("num_image_tokens", spec.hidden))
    vocabulary = Vocabulary(g, spec, weights, head=False)

    def op(
        kind: str,
        *inputs: Value,
        of: str = "int64",
        out: tuple[int | str, ...] = lead,
        **attributes: Attribute,
    ) -> Value:
        return g.op(kind, *inputs, shape=out, dtype=of, name=_PATH, domain="", **attributes)

    def counted(places: Value) -> Value:
        return op("CumSum", g.cast(places, "int64", ("places",), _PATH), g.integer(0), out=("places",))

    flat = op("Reshape", ids, g.integers(-1), out=("places",))
    theirs = op("Less", flat, g.integer(0), of="bool", out=("places",))
    count = op("Squeeze", op("Shape", features, out=(1,), start=0, end=1), out=())
    if token >= 0:
        # What negative ids leave. Where nothing is left, the token is a word like any other.
        taken = op("ReduceSum", g.cast(theirs, "int64", ("places",), _PATH), out=(), keepdims=0)
        named = op("Equal", flat, g.integer(token), of="bool", out=("places",))
        left = op("LessOrEqual", counted(named), op("Sub", count, taken, out=()), of="bool", out=("places",))
        named = op("And", named, left, of="bool", out=("places",))
        theirs = op("Or", theirs, named, of="bool", out=("places",))
    # The number of each place that is theirs; all others point at a row of zeros after the features.
    number = op("Sub", counted(theirs), g.integer(1), out=("places",))
    number = op("Where", theirs, number, count, out=("places",))
    sizes = op("Shape", ids, out=(2,))
    number, theirs = op("Reshape", number, sizes), op("Reshape", theirs, sizes, of="bool")
    words = embeddings(g, spec, vocabulary, op("Where", theirs, g.integer(0), ids), shape)
    nothing = op("Expand", g.number(0.0), g.integers(1, spec.hidden), of=dtype, out=(1, spec.hidden))
    rows = op("Concat", features, nothing, of=dtype, out=("num_image_tokens_and_one", spec.hidden), axis=0)
    images = op("Gather", rows, number, of=dtype, out=shape, axis=0)
    theirs = op("Unsqueeze", theirs, g.integers(2), of="bool", out=(*lead, 1))
    g.output(op("Where", theirs, images, words, of=dtype, out=shape), "inputs_embeds", shape)
    inputs = {"input_ids": "input_ids", "image_features": "image_features"}
    return Emitted(g, inputs, {"inputs_embeds": "inputs_embeds"}, {})
