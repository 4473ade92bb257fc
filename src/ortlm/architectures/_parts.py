"""What nearly all families share: sizes, and tensor names that follow one pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ortlm.architectures._config import Config
from ortlm.architectures._keys import quoted
from ortlm.errors import UnsupportedModel
from ortlm.spec import (
    AltUp,
    Architecture,
    Attention,
    Decoder,
    Experts,
    Layer,
    Norm,
    PerLayerInputs,
    Rope,
    Source,
    Sources,
    parameters,
)

# Canonical part of a layer, or of the model, to the usual module name.
_NAMES = {
    "embed": "model.embed_tokens",
    "mixer_pre": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "ffn_pre": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{}.gate_proj",
    "expert_up": "mlp.experts.{}.up_proj",
    "expert_down": "mlp.experts.{}.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}

# Checkpoints that were saved from the class without a head have no prefix; those of text models that were cut out
# of larger ones have another.
_PREFIXES = (
    ("model.", ""),
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("model.", "language_model."),
    ("lm_head.", "language_model.lm_head."),
)

# A norm before and after both branches, as Gemma 2 and 3 have it.
SANDWICH = {
    "mixer_post": "post_attention_layernorm",
    "ffn_pre": "pre_feedforward_layernorm",
    "ffn_post": "post_feedforward_layernorm",
}


# Parts of a layer of CLIP and SigLIP.
VISION_LAYER = {
    "mixer_pre": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "ffn_pre": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


# Far beyond any model there is; what follows from larger numbers would fill the memory before the weights are
# looked at.
MOST_LAYERS, MOST_WIDE, MOST_TOKENS, MOST_EXPERTS = 10_000, 2**20, 10_000_000, 4096


def check_colors(config: Config) -> None:
    """Raise BadCheckpoint if images are of anything else than red, green and blue."""
    if config.integer("num_channels", 3) != 3:
        raise config.wrong("num_channels", "3, for red, green and blue")


_COUNTS = ("num_local_experts", "num_experts")


def check_silu(config: Config, default: str = "silu") -> None:
    """Raise UnsupportedModel if experts have another activation than SiLU: there is no kernel for others."""
    if config.activation("hidden_act", default) != "silu":
        raise UnsupportedModel(
            f'{config.at}: "hidden_act" is {quoted(config.text("hidden_act", default))}; experts are supported '
            'with "silu" only, for which ONNX Runtime has a kernel.'
        )


def experts(config: Config, count: int, *, chosen: int, intermediate: int) -> Experts:
    """Return experts of which the best are weighted by the softmax over those.

    ``count`` and ``chosen`` are the family's defaults. The number of experts has two names, which transformers
    takes for one in most families.
    """
    numbers = {key: config.integer(key) for key in _COUNTS if config.has(key)}
    number = next(iter(numbers.values()), count)
    if len(set(numbers.values())) > 1:
        raise config.wrong("num_experts", f'the same as "num_local_experts" ({number})')
    if not 2 <= number <= MOST_EXPERTS:
        raise config.wrong(next(iter(numbers), _COUNTS[0]), f"a whole number from 2 to {MOST_EXPERTS}")
    best = config.integer("num_experts_per_tok", chosen)
    if best > number:
        raise config.wrong("num_experts_per_tok", f"at most the number of experts ({number})")
    return Experts(number, best, intermediate)


def stacked_experts(decoder: Decoder, module: str) -> Sources:
    """Return where experts lie if those of a layer are one tensor: [experts, 2 · wide, hidden], and down.

    ``module`` is what a layer calls them.
    """
    result: Sources = {}
    for i, layer in enumerate(decoder.layers):
        if isinstance(layer.ffn, Experts):
            at, wide = f"model.layers.{i}.{module}", layer.ffn.intermediate
            for e in range(layer.ffn.experts):
                for part, tensor, rows in (
                    ("gate", "gate_up_proj", (0, wide)),
                    ("up", "gate_up_proj", (wide, 2 * wide)),
                    ("down", "down_proj", None),
                ):
                    name = f"layers.{i}.expert_{part}.{e}.weight"
                    result[name] = Source(f"{at}.{tensor}", rows=rows, index=e)
    return result


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a decoder, checked against each other; ``max_tokens`` is the context length in tokens."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_tokens: int


def sizes(config: Config, *, head_dim: int | None = None, kv_heads: int | None = None) -> Sizes:
    """Read the sizes; by default a head has ``head_dim`` channels, or hidden size over heads if None.

    ``kv_heads`` is how many key/value heads there are where the key is absent; if None, as many as heads.
    """
    hidden = config.integer("hidden_size", most=MOST_WIDE)
    heads = config.integer("num_attention_heads", most=MOST_WIDE)
    absent = kv_heads if kv_heads is not None and "num_key_value_heads" not in config.values else heads
    kv_heads = config.integer("num_key_value_heads", absent)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f'a divisor of "num_attention_heads" ({heads})')
    if head_dim is None and config.values.get("head_dim") is None and hidden % heads:
        raise config.wrong(
            "hidden_size", f'a multiple of "num_attention_heads" ({heads}) where "head_dim" is absent'
        )
    return Sizes(
        vocab=config.integer("vocab_size", most=MOST_TOKENS),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        layers=config.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.integer("head_dim", head_dim or hidden // heads, most=MOST_WIDE),
        max_tokens=config.integer("max_position_embeddings", most=MOST_TOKENS),
    )


def attention(
    sizes: Sizes,
    *,
    rope: Rope | None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: Norm | None = None,
    qk_norm_full: bool = False,
) -> Attention:
    """Return attention of the model's ``sizes``; scores are scaled by ``head_dim ** -0.5`` by default."""
    return Attention(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope=rope,
        scale=sizes.head_dim**-0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        qk_norm_full=qk_norm_full,
    )


def decoder_of(
    config: Config,
    sizes: Sizes,
    layers: tuple[Layer, ...],
    norm: Norm,
    *,
    tied: bool = False,
    head_bias: bool = False,
    embed_scale: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    per_layer_inputs: PerLayerInputs | None = None,
    altup: AltUp | None = None,
) -> Decoder:
    """Return the decoder of ``layers`` and a final ``norm``; ``tied`` is what an absent key means."""
    return Decoder(
        vocab=sizes.vocab,
        hidden=sizes.hidden,
        layers=layers,
        final_norm=norm,
        max_tokens=sizes.max_tokens,
        tied_head=config.flag("tie_word_embeddings", tied),
        head_bias=head_bias,
        embed_scale=embed_scale,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        per_layer_inputs=per_layer_inputs,
        altup=altup,
    )


def fused_rows(s: Sizes, *, qkv: str | None = None, gate_up: str | None = None) -> Sources:
    """Return where q, k and v lie in the tensor ``qkv`` of each layer, gate and up in ``gate_up``, as rows."""
    q, kv, wide = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate
    parts = [(qkv, "q", 0, q), (qkv, "k", q, q + kv), (qkv, "v", q + kv, q + 2 * kv)]
    parts += [(gate_up, "gate", 0, wide), (gate_up, "up", wide, 2 * wide)]
    return {
        f"layers.{i}.{part}.weight": Source(f"model.layers.{i}.{module}.weight", rows=(start, stop))
        for i in range(s.layers)
        for module, part, start, stop in parts
        if module is not None
    }


def architecture(
    decoder: Decoder,
    genai_type: str,
    *,
    names: Mapping[str, str] | None = None,
    norm_add: float = 0.0,
    fused: Sources | None = None,
    notes: Iterable[str] = (),
) -> Architecture:
    """Return ``decoder`` with a source for each weight.

    ``names`` overrides module names by canonical part, in which ``{}`` is an expert's number, or by part and layer
    ("layers.3.o"); ``fused`` has whole sources by canonical weight name, and ``norm_add`` is added to each norm's
    weight. ``notes`` are what whoever builds should know.
    """
    known = _NAMES | dict(names or {})
    sources: Sources = {}
    for parameter in parameters(decoder):
        layer = f"model.layers.{parameter.layer}." if parameter.layer is not None else ""
        add = norm_add if parameter.role == "norm" and parameter.kind == "weight" else 0.0
        own = f"layers.{parameter.layer}.{parameter.part}"
        module = known.get(own, known[parameter.part]).format(parameter.expert)
        # torch has an axis more for channels of a group, of which there is one.
        stored = None
        if parameter.part == "conv" and parameter.kind == "weight":
            stored = (parameter.shape[0], 1, parameter.shape[1])
        sources[parameter.name] = Source(f"{layer}{module}.{parameter.kind}", add=add, stored=stored)
    sources |= fused or {}
    return Architecture(decoder, sources, genai_type, renamed=_PREFIXES, notes=tuple(notes))
