"""What a model is, as plain data: no files, no ONNX, no family names.

An architecture turns ``config.json`` into a ``Decoder``; graphs, weight shapes, cache sizes, parameter
counts and the manifest all follow from it. What varies is the *type* of a part, not a flag: a layer's
``mixer`` may be any mixer and its ``ffn`` any feed-forward.

Shapes use these letters: B batch, S new tokens, T all tokens so far, H hidden, N heads, K key/value heads,
D head size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalization over the last axis.

    ``kind`` is ``"rms"`` (no mean, no bias) or ``"layer"`` (mean and variance). ``bias`` says whether a
    ``.bias`` weight exists. A stored weight that means ``1 + weight`` is corrected where weights are read.
    """

    eps: float
    kind: str = "rms"
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding with its final frequencies.

    ``inv_freq`` has ``dims / 2`` angular frequencies in radians per token, as float32 would hold them.
    ``factor`` multiplies cos and sin. With ``long_inv_freq`` set, all positions are rotated by that table
    (times ``long_factor``) once the total length exceeds ``switch_tokens``.
    ``interleaved`` pairs channels (0, 1), (2, 3), … instead of (0, D/2), (1, D/2 + 1), ….
    With ``axes`` a token has three positions, by time, row and column of images, and each frequency goes with the
    one of this number, 0 to 2 (Wang et al. 2024); they are equal for text.
    """

    inv_freq: tuple[float, ...]
    factor: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    long_factor: float = 1.0
    switch_tokens: int | None = None
    interleaved: bool = False
    axes: tuple[int, ...] | None = None

    @property
    def dims(self) -> int:
        """Number of channels of a head that are rotated; the rest pass through."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class QueryScale:
    """Queries at position p, from 0, are multiplied by ``1 + beta · ln(1 + floor(p / length))``."""

    beta: float
    length: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with a growing key/value cache.

    ``scale`` multiplies query·key. ``window`` is how many positions a token sees, itself included; None is
    all. ``softcap`` c bounds scores to c·tanh(score / c). ``qk_norm`` normalizes queries and keys before
    rotation: over each head, or over the full projection if ``qk_norm_full``. Heads share its weights, unless each
    has its own (``qk_norm_apart``); it comes after rotation if ``qk_norm_late``. With ``sinks`` each head has a
    learned score of no position, which takes a part of the attention. ``query_scale`` follows the position.
    ``v_norm`` normalizes the values of each head, without weights. With ``values_are_keys`` values are what the
    map of keys gives, before keys are normalized and rotated. If ``gated``,
    the map of queries gives each head as many numbers more, whose sigmoid multiplies what the head found.
    ``shared`` is the number of an earlier layer whose keys and values this one attends to: it has none of its own,
    and they agree in heads, size and rotation.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    window: int | None = None
    softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_full: bool = False
    sinks: bool = False
    qk_norm_apart: bool = False
    qk_norm_late: bool = False
    query_scale: QueryScale | None = None
    v_norm: Norm | None = None
    values_are_keys: bool = False
    gated: bool = False
    shared: int | None = None

    @property
    def width(self) -> int:
        """Number of channels that the output projection reads."""
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A gated short convolution: ``c · conv(b · x)``, where b, c and x are thirds of one map of the input.

    Each of the ``width`` channels is convolved on its own, with the ``kernel`` last tokens. ``bias``: the maps and
    the convolution have biases.
    """

    width: int
    kernel: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Linear attention by the gated delta rule (Yang et al. 2024), with a state for each head.

    A state has ``key_dim`` by ``value_dim`` numbers. A map of the input, convolved with the ``kernel`` last
    tokens as in ShortConv, then through SiLU, gives queries and keys of ``key_heads`` heads, of unit length
    each, and values of ``value_heads`` heads. For each token the state is multiplied by exp(-exp(``a_log``) ·
    softplus(a + ``dt_bias``)), and what it returns for the key moves to the value by the part sigmoid(b); a and
    b are maps of the input, too. What the query reads is normalized over each head (``norm``) and multiplied by
    SiLU of another map, z.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: Norm

    @property
    def width(self) -> int:
        """Number of channels that the output projection reads."""
        return self.value_heads * self.value_dim

    @property
    def keys(self) -> int:
        """Number of channels of all keys."""
        return self.key_heads * self.key_dim

    @property
    def mixed(self) -> int:
        """Number of channels of queries, keys and values together."""
        return 2 * self.keys + self.width


@dataclass(frozen=True, slots=True)
class Mamba2:
    """A selective state space (Dao and Gu 2024); each head's state has ``state`` by ``head_dim`` numbers.

    A map of the input, convolved with the ``kernel`` last tokens, then through SiLU, gives what each head reads
    (x), and for ``groups`` of heads keys and queries of ``state`` channels. With t = softplus(a + ``dt_bias``),
    a another map, the state is multiplied by exp(-exp(``a_log``) · t) and gains key · t · x. What the query
    reads, plus ``skip`` · x, is multiplied by SiLU of a third map, z, and normalized over each group
    (``norm``).
    """

    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    norm: Norm
    conv_bias: bool = True

    @property
    def width(self) -> int:
        """Number of channels that the output projection reads."""
        return self.heads * self.head_dim

    @property
    def mixed(self) -> int:
        """Number of channels that are convolved."""
        return self.width + 2 * self.groups * self.state


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """``down(act(gate(x)) * up(x))``; ``act`` is "silu", "gelu" or "gelu_tanh".

    With ``cutoff``, of each token's gate(x) only what is above its mean plus so many standard deviations counts,
    by as much as it is.
    """

    intermediate: int
    act: str
    bias: bool = False
    cutoff: float | None = None


@dataclass(frozen=True, slots=True)
class MLP:
    """``down(act(up(x)))``; ``act`` is "silu", "gelu", "gelu_tanh", "quick_gelu", "relu2" or "xielu".

    "xielu" has four learned numbers, ``XIELU``: beta·x + p·x² above zero, beta·x + n·(exp(min(x, eps)) - 1 - x)
    below, with p = softplus(alpha_p) and n = beta + softplus(alpha_n). Source: https://arxiv.org/abs/2411.13010.
    """

    intermediate: int
    act: str
    bias: bool = False


# The learned numbers of the activation of that name.
XIELU = ("alpha_p", "alpha_n", "beta", "eps")

# How a router's logits become weights, see ``Experts.routing``.
CHOSEN_SOFTMAX, SOFTMAX, SPARSE_MIXER, SIGMOID = "chosen_softmax", "softmax", "sparse_mixer", "sigmoid"


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: a router gives each a logit, and the ``top_k`` largest compute the token.

    An expert is ``down(g · sigmoid(alpha · g) · (u + beta))`` of g = gate(x) and u = up(x), with ``intermediate``
    channels; with ``limit`` g is at most that, and u within plus and minus that. Outputs are added, each times its
    weight. ``routing`` says which weights the logits give: "chosen_softmax" is the softmax over those chosen,
    "softmax" what the softmax over all gives the chosen, and "sparse_mixer" (``top_k`` 2) a softmax for each of
    the two, over all whose logit is relatively near: (largest - logit) / max(abs(logit), largest) at most
    2 · ``mixer_eps``, for the second without the first. "sigmoid" is the sigmoid of each; with ``offset`` a
    learned number is added to it to choose by, and not to weigh by; with ``summed`` the weights of those chosen
    are divided by their sum plus 1e-6. ``factor`` multiplies them. ``bias``: the experts' maps have biases;
    ``router_bias``: the router has.

    ``act`` "gelu" or "gelu_tanh" is in place of g · sigmoid(alpha · g). With ``expert_scale`` the weight of each
    expert is multiplied by a learned number.

    ``shared`` channels (0 is none) compute every token as a gated MLP with the same ``act`` does; with
    ``shared_scale`` its output is multiplied by the sigmoid of one more logit. With ``norm`` the router, the
    experts and the shared MLP read the stream each through a norm of its own (``router_norm``, ``expert_pre``,
    ``shared_pre``), and what experts and MLP give is normalized (``expert_post``, ``shared_post``) before it is
    added. ``router_scale`` multiplies the router's logits.
    """

    experts: int
    top_k: int
    intermediate: int
    routing: str = CHOSEN_SOFTMAX
    mixer_eps: float = 0.01
    offset: bool = False
    summed: bool = False
    factor: float = 1.0
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    bias: bool = False
    router_bias: bool = False
    shared: int = 0
    shared_scale: bool = False
    act: str = "silu"
    expert_scale: bool = False
    norm: Norm | None = None
    router_scale: float = 1.0


Mixer = Attention | ShortConv | DeltaNet | Mamba2
FeedForward = GatedMLP | MLP | Experts


@dataclass(frozen=True, slots=True)
class MixerState:
    """One tensor that a mixer carries from step to step, [B, ``shape``]; a size that is None grows with the text.

    ``name`` is "key" or "value", "conv" (a convolution's last inputs) or "recurrent" (a matrix for each head).
    """

    name: str
    shape: tuple[int | None, ...]

    @property
    def grows(self) -> bool:
        """Whether it has something for every position; the others have one size, and cannot be cut."""
        return None in self.shape


def mixer_states(mixer: Mixer) -> tuple[MixerState, ...]:
    """Return what ``mixer`` carries from step to step, in the order of graphs and manifests."""
    if isinstance(mixer, Attention) and mixer.shared is not None:
        return ()
    if isinstance(mixer, Attention):
        shape = (mixer.kv_heads, None, mixer.head_dim)
        return MixerState("key", shape), MixerState("value", shape)
    if isinstance(mixer, Mamba2):
        recurrent = (mixer.heads, mixer.state, mixer.head_dim)
        return MixerState("conv", (mixer.mixed, mixer.kernel - 1)), MixerState("recurrent", recurrent)
    if isinstance(mixer, DeltaNet):
        recurrent = (mixer.value_heads, mixer.key_dim, mixer.value_dim)
        return MixerState("conv", (mixer.mixed, mixer.kernel - 1)), MixerState("recurrent", recurrent)
    return (MixerState("conv", (mixer.width, mixer.kernel - 1)),)


@dataclass(frozen=True, slots=True)
class PerLayerInputs:
    """Per-layer embeddings: each layer has a vector of ``width`` for each token, next to the residual stream.

    It is ``(scale · row + norm(map_scale · map)) · 2 ** -0.5``: the layer's part of a row of a table of ``vocab``
    tokens, whose first row serves ids that are not in it, and a map of the token's embedding. A layer adds
    ``per_layer_post(out(act(gate(x)) · vector))`` to its stream x.
    """

    vocab: int
    width: int
    scale: float
    map_scale: float
    norm: Norm
    act: str


@dataclass(frozen=True, slots=True)
class Laurel:
    """A learned residual (Menghani et al. 2024): of what goes into the mixer, ``x + norm(right(left(x)))``.

    ``left`` leads to ``rank`` channels. It is added with the mixer's branch, and all is then divided by √2.
    """

    rank: int
    norm: Norm


@dataclass(frozen=True, slots=True)
class AltUp:
    """Several residual streams (Baykal et al. 2023), of which each layer computes the one of number ``active``.

    A layer predicts all ``streams`` as ``x + C · x``, runs on one of them, and adds to each what that one has
    changed, times a number. Both C and these numbers are maps of tanh(router(norm(s) / H)), s being the stream
    that the layer runs on. ``scaled``: ``PerLayerInputs`` reads that stream times learned numbers; it adds to all
    streams but the first. The first begins with the embeddings, the others with maps of them. In the end the mean
    is taken of the first and of maps of the others. What a map gives gets the first stream's root mean square.
    """

    streams: int
    active: int
    norm: Norm
    scaled: bool = True


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    ``x += residual_scale · mixer_post(mixer(mixer_pre(x)))``, then the same with ``ffn``; a norm that is
    None is left out. With ``parallel``, both branches read the same ``mixer_pre(x)`` and are added at once. With
    ``per_layer_post`` what ``PerLayerInputs`` says is added after that. With ``scaled`` the stream is then
    multiplied by a learned number.
    """

    mixer: Mixer
    ffn: FeedForward
    mixer_pre: Norm | None
    ffn_pre: Norm | None
    mixer_post: Norm | None = None
    ffn_post: Norm | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    scaled: bool = False
    per_layer_post: Norm | None = None
    laurel: Laurel | None = None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model.

    ``embed_scale`` multiplies embeddings, ``logit_scale`` logits; ``logit_softcap`` c bounds logits to
    c·tanh(logit / c), 0 is off. ``max_tokens`` is the context length. With ``per_layer_inputs``
    layers read token ids, too.
    """

    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    max_tokens: int
    tied_head: bool
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    per_layer_inputs: PerLayerInputs | None = None
    altup: AltUp | None = None

    @property
    def streams(self) -> int:
        """Number of residual streams."""
        return 1 if self.altup is None else self.altup.streams

    @property
    def attentions(self) -> Iterator[Attention]:
        """The mixers of those layers that attend."""
        return (layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention))

    @property
    def cached(self) -> Iterator[tuple[int, Attention]]:
        """Numbers and mixers of those layers that have keys and values of their own."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mixer, Attention) and layer.mixer.shared is None:
                yield i, layer.mixer

    @property
    def sharing(self) -> frozenset[int]:
        """Numbers of the layers whose keys and values later layers attend to."""
        return frozenset(mixer.shared for mixer in self.attentions if mixer.shared is not None)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A transformer over the patches of images of ``side`` by ``side`` pixels, ``patch`` by ``patch`` each.

    Patches are mapped to ``hidden`` channels (with ``patch_bias``), a ``class_token`` may come before them, and
    positions are learned. ``pre_norm`` normalizes what goes into the first layer, ``final_norm`` what comes out of
    the last one. A layer is ``x += attention(norm(x))``, then ``x += mlp(norm(x))``; all maps have biases. If
    ``padded``, views may end with patches of padding: nothing attends to those, and the others' positions are
    spread over the whole square; padding has the first position.
    """

    side: int
    patch: int
    hidden: int
    heads: int
    layers: int
    ffn: MLP
    norm: Norm
    class_token: bool = False
    patch_bias: bool = False
    pre_norm: bool = False
    final_norm: bool = False
    padded: bool = False

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch


@dataclass(frozen=True, slots=True)
class WindowedEncoder:
    """A transformer over the patches of one image of any size, whose layers attend within windows of the image.

    A patch has ``patch`` by ``patch`` pixels in each of ``frames`` frames, which are equal for an image. Squares
    of ``merge`` by ``merge`` patches become one token later. A window is ``window`` by ``window`` such squares,
    and smaller at the right and lower edges; layers whose numbers are in ``whole`` attend to the whole image.
    Heads are rotated: the first half of their pairs by the patch's row, the second by its column, both with
    ``inv_freq``. A layer is ``x += attention(norm(x))``, then ``x += ffn(norm(x))``; all maps but that of patches
    have biases.
    """

    patch: int
    frames: int
    merge: int
    window: int
    hidden: int
    heads: int
    layers: int
    whole: tuple[int, ...]
    ffn: GatedMLP
    norm: Norm
    inv_freq: tuple[float, ...]

    @property
    def inputs(self) -> int:
        """Numbers of a patch: three colors of all its pixels, in all frames."""
        return 3 * self.frames * self.patch**2


@dataclass(frozen=True, slots=True)
class Merged:
    """Squares of patches become one token: each patch is normalized, and those of a square are put in a row.

    A map with activation ``act`` that keeps the width, and a second one, lead to the decoder's channels.
    """

    norm: Norm
    act: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """An image as one view of the whole and a grid of crops, each seen by the vision encoder on its own.

    ``merge`` by ``merge`` patches become one. Rows of merged patches run through all crops side by side and end
    with a learned separator; another one stands between the crops, which come first, and the view of the whole.
    A map with activation ``act`` and a second one lead to the decoder's channels. What is merged is put in a row,
    or with ``mean`` becomes the mean. Rows and columns of the crops that begin with padding are left out.
    """

    merge: int
    act: str
    mean: bool = False

    def width(self, encoder: Encoder) -> int:
        """Return how many channels a merged patch has."""
        return encoder.hidden * (1 if self.mean else self.merge**2)


@dataclass(frozen=True, slots=True)
class Pooled:
    """One view of the image: means over squares of patches, ``tokens`` by ``tokens`` of them.

    They are normalized and mapped to the decoder's channels, without a bias.
    """

    tokens: int
    norm: Norm


@dataclass(frozen=True, slots=True)
class PanAndScan:
    """How a long image is cut along its longer side into crops that the decoder sees as images of their own.

    An image whose longer side is at least ``ratio`` times the shorter is cut, into at most ``crops`` crops of
    about a square each, unless a side of a crop had fewer than ``smallest`` pixels. In the text ``before`` comes
    before the whole image, ``between`` after it, and ``separator`` between crops. All but the texts are what the
    publisher's settings may change.
    """

    smallest: int
    crops: int
    ratio: float
    before: str
    between: str
    separator: str


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """What stands for an image in a text, and what tokens it becomes.

    ``tag`` stands for it in a text; ``{}`` in it is the image's number, from 1. ``before`` and ``after`` are
    texts around its tokens. ``token`` is the text of the token that the decoder's embeddings are replaced at,
    None if the ids are negative numbers. With ``separate``, texts between images are tokenized on their own,
    special tokens included. ``tag_end`` follows the tag of an image in a message, where tags have numbers.
    """

    tag: str
    before: str = ""
    after: str = ""
    token: str | None = None
    separate: bool = False
    tag_end: str = "\n"


@dataclass(frozen=True, slots=True)
class Vision:
    """How images become embeddings of the decoder.

    ``mean`` and ``std`` normalize red, green and blue, which are 0 to 1. ``crops`` is how many crops an image
    is cut into at most, unless somebody asks for another number; 0 where it is not cut. ``token`` is the id of
    ``prompt.token`` (-1 if there is none), ``start`` that of a token that always comes before an image's.
    ``mutual``: tokens of an image attend to each other both ways. ``pixels`` are the least and the most that an
    image of any size is resized to, unless the publisher says otherwise; an encoder of one size has none.
    ``pan_and_scan``: long images may be cut into images. ``adapter`` is the name of the LoRA adapter that the
    decoder needs for prompts with images.
    """

    encoder: Encoder | WindowedEncoder
    projector: Tiles | Pooled | Merged
    prompt: ImagePrompt
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crops: int = 0
    token: int = -1
    start: int = -1
    mutual: bool = False
    pixels: tuple[int, int] | None = None
    pan_and_scan: PanAndScan | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight that the spec implies: what it is part of, its shape, and what recipes group it by.

    ``part`` is "q", "mixer_pre" or "embed", for example, in ``layer`` if it belongs to one; with ``vision`` it is
    not the decoder's, but the vision encoder's or projector's, and with ``expert`` that expert's. ``kind`` is
    "weight" or "bias". A linear weight has shape [out, in]. ``role`` is "embed", "head", "qkv", "out", "gate_up",
    "down", "experts", "router", "per_layer_embed", "vision", "table", "norm" or "bias".
    """

    part: str
    kind: str
    shape: tuple[int, ...]
    role: str
    layer: int | None = None
    vision: bool = False
    expert: int | None = None

    @property
    def name(self) -> str:
        """The canonical name, such as "layers.3.q.weight" or "layers.3.expert_up.15.weight"."""
        layer = "" if self.layer is None else f"layers.{self.layer}."
        expert = "" if self.expert is None else f".{self.expert}"
        return f"{'vision.' if self.vision else ''}{layer}{self.part}{expert}.{self.kind}"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameters(spec: Decoder) -> Iterator[Parameter]:
    """Yield every weight of ``spec`` once, in the order of computation.

    Canonical names: ``embed``, ``layers.{i}.{mixer_pre|q|k|v|q_norm|k_norm|o|mixer_post|ffn_pre|gate|up|down|
    ffn_post}``, ``final_norm`` and ``head``, each with ``.weight`` or ``.bias``. A tied head is left out. Layers
    without attention have ``in`` and ``conv`` in place of q, k and v, some also
    ``{z|b|a|a_log|dt_bias|skip|out_norm}``. Layers of experts have ``router``, ``offset``,
    ``expert_{gate|up|down}.{e}``, ``shared_{gate|up|down}`` and ``shared_scale``; some ``expert_scale``,
    ``router_norm`` and ``{shared|expert}_{pre|post}``. With ``PerLayerInputs`` there are ``per_layer_embed``,
    ``per_layer_map_norm`` and ``layers.{i}.per_layer_{map|gate|out|post}``, with ``Laurel``
    ``layers.{i}.laurel_{left|right|post}``, with ``AltUp`` ``altup_{in|out}{n}`` and
    ``layers.{i}.altup_{norm|router|predict|correct|scale}``.
    """
    yield Parameter("embed", "weight", (spec.vocab, spec.hidden), "embed")
    inputs = spec.per_layer_inputs
    if inputs is not None:
        yield Parameter(
            "per_layer_embed", "weight", (inputs.vocab, inputs.width * len(spec.layers)), "per_layer_embed"
        )
        for i in range(len(spec.layers)):
            yield Parameter("per_layer_map", "weight", (inputs.width, spec.hidden), "embed", i)
        yield from _norm("per_layer_map_norm", inputs.norm, inputs.width)
    for part in ("altup_in", "altup_out"):
        for i in range(1, spec.streams):
            yield Parameter(f"{part}{i}", "weight", (spec.hidden, spec.hidden), "embed")
    for i, layer in enumerate(spec.layers):
        if spec.altup is not None:
            yield from _altup_parameters(spec.altup, i, spec.hidden)
        yield from _norm("mixer_pre", layer.mixer_pre, spec.hidden, layer=i)
        if layer.laurel is not None:
            yield from _linear("laurel_left", layer.laurel.rank, spec.hidden, "gate_up", bias=False, layer=i)
            yield from _linear("laurel_right", spec.hidden, layer.laurel.rank, "down", bias=False, layer=i)
            yield from _norm("laurel_post", layer.laurel.norm, spec.hidden, layer=i)
        yield from mixer_parameters(layer.mixer, i, spec.hidden)
        yield from _norm("mixer_post", layer.mixer_post, spec.hidden, layer=i)
        yield from _norm("ffn_pre", layer.ffn_pre, spec.hidden, layer=i)
        yield from ffn_parameters(layer.ffn, i, spec.hidden)
        yield from _norm("ffn_post", layer.ffn_post, spec.hidden, layer=i)
        if inputs is not None and layer.per_layer_post is not None:
            yield from _linear("per_layer_gate", inputs.width, spec.hidden, "gate_up", bias=False, layer=i)
            yield from _linear("per_layer_out", spec.hidden, inputs.width, "down", bias=False, layer=i)
            yield from _norm("per_layer_post", layer.per_layer_post, spec.hidden, layer=i)
        if layer.scaled:
            yield Parameter("scale", "weight", (1,), "table", i)
    yield from _norm("final_norm", spec.final_norm, spec.hidden)
    if not spec.tied_head:
        yield Parameter("head", "weight", (spec.vocab, spec.hidden), "head")
    if spec.head_bias:
        yield Parameter("head", "bias", (spec.vocab,), "bias")


def _altup_parameters(altup: AltUp, layer: int, hidden: int) -> Iterator[Parameter]:
    count = altup.streams
    yield from _norm("altup_norm", altup.norm, hidden, layer=layer)
    for part, out, width in (
        ("altup_router", count, hidden), ("altup_predict", count * count, count), ("altup_correct", count, count)
    ):  # fmt: skip
        yield from _linear(part, out, width, "router", bias=False, layer=layer)
    if altup.scaled:
        yield Parameter("altup_scale", "weight", (hidden,), "table", layer)


def mixer_parameters(mixer: Mixer, layer: int, hidden: int) -> Iterator[Parameter]:
    """Yield the weights of ``mixer`` in ``layer``, between ``hidden`` channels."""
    if isinstance(mixer, ShortConv):
        yield from _linear("in", 3 * mixer.width, hidden, "qkv", bias=mixer.bias, layer=layer)
        yield from _conv(mixer.width, mixer.kernel, bias=mixer.bias, layer=layer)
        yield from _linear("o", hidden, mixer.width, "out", bias=mixer.bias, layer=layer)
        return
    if isinstance(mixer, Mamba2):
        for part, width, role in (
            ("z", mixer.width, "qkv"), ("in", mixer.mixed, "qkv"), ("a", mixer.heads, "router")
        ):  # fmt: skip
            yield from _linear(part, width, hidden, role, bias=False, layer=layer)
        yield from _conv(mixer.mixed, mixer.kernel, bias=mixer.conv_bias, layer=layer)
        for part, width in (("a_log", mixer.heads), ("dt_bias", mixer.heads), ("skip", mixer.heads)):
            yield Parameter(part, "weight", (width,), "table", layer)
        yield Parameter("out_norm", "weight", (mixer.width,), "table", layer)
        yield from _linear("o", hidden, mixer.width, "out", bias=False, layer=layer)
        return
    if isinstance(mixer, DeltaNet):
        heads = mixer.value_heads
        for part, width, role in (
            ("in", mixer.mixed, "qkv"), ("z", mixer.width, "qkv"), ("b", heads, "router"), ("a", heads, "router")
        ):  # fmt: skip
            yield from _linear(part, width, hidden, role, bias=False, layer=layer)
        yield from _conv(mixer.mixed, mixer.kernel, bias=False, layer=layer)
        for part, width in (("a_log", heads), ("dt_bias", heads), ("out_norm", mixer.value_dim)):
            yield Parameter(part, "weight", (width,), "table", layer)
        yield from _linear("o", hidden, mixer.width, "out", bias=False, layer=layer)
        return
    wide, narrow = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    absent = ("k", "v", "k_norm") if mixer.shared is not None else ("v",) if mixer.values_are_keys else ()
    for part, width in (("q", (1 + mixer.gated) * wide), ("k", narrow), ("v", narrow)):
        if part not in absent:
            yield from _linear(part, width, hidden, "qkv", bias=mixer.qkv_bias, layer=layer)
    for part, width in (("q_norm", wide), ("k_norm", narrow)):
        if part in absent:
            continue
        whole = mixer.qk_norm_full or mixer.qk_norm_apart
        yield from _norm(part, mixer.qk_norm, width if whole else mixer.head_dim, layer=layer)
    if mixer.sinks:
        yield Parameter("sinks", "weight", (mixer.heads,), "table", layer)
    yield from _linear("o", hidden, wide, "out", bias=mixer.out_bias, layer=layer)


def _conv(width: int, kernel: int, *, bias: bool, layer: int) -> Iterator[Parameter]:
    yield Parameter("conv", "weight", (width, kernel), "table", layer)
    if bias:
        yield Parameter("conv", "bias", (width,), "bias", layer)


def ffn_parameters(ffn: FeedForward, layer: int, hidden: int) -> Iterator[Parameter]:
    """Yield the weights of the feed-forward block ``ffn`` in ``layer``, between ``hidden`` channels."""
    if isinstance(ffn, Experts):
        yield from _expert_parameters(ffn, layer, hidden)
        return
    if isinstance(ffn, GatedMLP):
        yield from _linear("gate", ffn.intermediate, hidden, "gate_up", bias=ffn.bias, layer=layer)
    yield from _linear("up", ffn.intermediate, hidden, "gate_up", bias=ffn.bias, layer=layer)
    if ffn.act == "xielu":
        for part in XIELU:
            yield Parameter(part, "weight", (1,), "table", layer)
    yield from _linear("down", hidden, ffn.intermediate, "down", bias=ffn.bias, layer=layer)


def _expert_parameters(ffn: Experts, layer: int, hidden: int) -> Iterator[Parameter]:
    wide = ffn.intermediate
    for part in (
        "router_norm",
        "expert_pre",
        "expert_post",
        *(("shared_pre", "shared_post") if ffn.shared else ()),
    ):
        yield from _norm(part, ffn.norm, hidden, layer=layer)
    yield from _linear("router", ffn.experts, hidden, "router", bias=ffn.router_bias, layer=layer)
    for part, there in (("offset", ffn.offset), ("expert_scale", ffn.expert_scale)):
        if there:
            yield Parameter(part, "weight", (ffn.experts,), "table", layer)
    for part, out, width in (
        ("expert_gate", wide, hidden), ("expert_up", wide, hidden), ("expert_down", hidden, wide)
    ):  # fmt: skip
        for e in range(ffn.experts):
            yield from (
                replace(p, expert=e) for p in _linear(part, out, width, "experts", bias=ffn.bias, layer=layer)
            )
    if ffn.shared:
        yield from _linear("shared_gate", ffn.shared, hidden, "gate_up", bias=False, layer=layer)
        yield from _linear("shared_up", ffn.shared, hidden, "gate_up", bias=False, layer=layer)
        yield from _linear("shared_down", hidden, ffn.shared, "down", bias=False, layer=layer)
    if ffn.shared_scale:
        yield from _linear("shared_scale", 1, hidden, "router", bias=False, layer=layer)


def _linear(
    part: str,
    out: int,
    width: int,
    role: str,
    *,
    bias: bool,
    layer: int | None = None,
    vision: bool = False,
) -> Iterator[Parameter]:
    yield Parameter(part, "weight", (out, width), role, layer, vision)
    if bias:
        yield Parameter(part, "bias", (out,), "bias", layer, vision)


def _norm(
    part: str, norm: Norm | None, width: int, *, layer: int | None = None, vision: bool = False
) -> Iterator[Parameter]:
    if norm is not None:
        yield Parameter(part, "weight", (width,), "norm", layer, vision)
        if norm.bias:
            yield Parameter(part, "bias", (width,), "norm", layer, vision)


def vision_parameters(vision: Vision, hidden: int) -> Iterator[Parameter]:
    """Yield every weight that turns images into embeddings of ``hidden`` channels.

    Canonical names: ``vision.{patches|class|positions|pre_norm|final_norm}``,
    ``vision.layers.{i}.{mixer_pre|q|k|v|o| ffn_pre|gate|up|down}``, and of the projector
    ``vision.{row_end|view_end|join1|join2}``, ``vision.{join_norm|join}`` or ``vision.{join_norm|join1|join2}``.
    The matrix of patches has shape [hidden, 3 · patch · patch], times the frames.
    """
    encoder, ffn, projector = vision.encoder, vision.encoder.ffn, vision.projector
    wide = encoder.hidden

    def linear(
        part: str, out: int, width: int, role: str = "vision", *, bias: bool = True, layer: int | None = None
    ) -> Iterator[Parameter]:
        return _linear(part, out, width, role, bias=bias, layer=layer, vision=True)

    def norm(part: str, norm: Norm | None, layer: int | None = None) -> Iterator[Parameter]:
        return _norm(part, norm, wide, layer=layer, vision=True)

    def table(part: str, *shape: int) -> Parameter:
        return Parameter(part, "weight", shape, "table", vision=True)

    if isinstance(encoder, Encoder):
        yield from linear("patches", wide, 3 * encoder.patch**2, "table", bias=encoder.patch_bias)
        if encoder.class_token:
            yield table("class", wide)
        yield table("positions", encoder.grid**2 + encoder.class_token, wide)
        yield from norm("pre_norm", encoder.norm if encoder.pre_norm else None)
    else:
        yield from linear("patches", wide, encoder.inputs, "table", bias=False)
    for i in range(encoder.layers):
        yield from norm("mixer_pre", encoder.norm, i)
        for part in ("q", "k", "v", "o"):
            yield from linear(part, wide, wide, layer=i)
        yield from norm("ffn_pre", encoder.norm, i)
        if isinstance(ffn, GatedMLP):
            yield from linear("gate", ffn.intermediate, wide, bias=ffn.bias, layer=i)
        yield from linear("up", ffn.intermediate, wide, bias=ffn.bias, layer=i)
        yield from linear("down", wide, ffn.intermediate, bias=ffn.bias, layer=i)
    if isinstance(encoder, Encoder):
        yield from norm("final_norm", encoder.norm if encoder.final_norm else None)
    if isinstance(encoder, WindowedEncoder):
        yield from norm("join_norm", projector.norm if isinstance(projector, Merged) else None)
        merged = wide * encoder.merge**2
        yield from linear("join1", merged, merged)
        yield from linear("join2", hidden, merged)
    elif isinstance(projector, Tiles):
        assert isinstance(encoder, Encoder)
        merged = projector.width(encoder)
        yield table("row_end", merged)
        yield table("view_end", merged)
        yield from linear("join1", hidden, merged)
        yield from linear("join2", hidden, hidden)
    else:
        yield from norm("join_norm", projector.norm)
        yield from linear("join", hidden, wide, bias=False)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical weight lies in the checkpoint.

    ``rows`` takes the rows [start, stop) of a tensor that holds several weights one below the other, every
    ``step``-th of them where their rows take turns; ``pieces`` takes several such ranges, one below the other.
    ``index``: the tensor holds a matrix or vector for each
    expert, and this one's is meant. ``add`` is added to every element: 1.0 for norms stored as ``weight - 1``.
    ``stored`` is the tensor's shape where it differs from the weight's, whose elements it has in the same order.
    ``transposed``: a matrix that lies there as [in, out]. ``below`` are further tensors of the same shape, which
    make up the weight with the first, one below the other.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    add: float = 0.0
    stored: tuple[int, ...] | None = None
    transposed: bool = False
    step: int = 1
    index: int | None = None
    pieces: tuple[tuple[int, int], ...] = ()
    below: tuple[str, ...] = ()


Sources = dict[str, Source]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture file says of one checkpoint; ``vision`` is None for models of text.

    ``sources`` has one entry for each of ``parameters``. ``ignored`` are tensor-name patterns
    (``fnmatch``) that checkpoints of this family may hold and that are not part of the model.
    ``head_copy`` names the tensor that a tied checkpoint may hold as a copy of its embeddings. ``renamed`` are
    pairs of prefixes: a tensor that is not there under the first may be there under the second.
    ``others`` are sources in place of those whose tensor is in the checkpoint under no name, because it was saved
    in another form. ``genai_type`` is the model type that onnxruntime-genai's C++ code knows; it selects its
    behavior. ``notes`` are what whoever builds should know of ``config.json``, a sentence each. ``seeing`` is
    the same model with images, where those need an adapter that a build may have or not.
    """

    decoder: Decoder
    sources: Sources
    genai_type: str
    ignored: tuple[str, ...] = field(default=("*.rotary_emb.inv_freq", "rotary_emb.inv_freq"))
    head_copy: str = "lm_head.weight"
    renamed: tuple[tuple[str, str], ...] = ()
    others: Sources = field(default_factory=dict)
    vision: Vision | None = None
    notes: tuple[str, ...] = ()
    seeing: Architecture | None = None

    @property
    def parameters(self) -> Iterator[Parameter]:
        """Every weight, of decoder and vision, once."""
        yield from parameters(self.decoder)
        if self.vision is not None:
            yield from vision_parameters(self.vision, self.decoder.hidden)
