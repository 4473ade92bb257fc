"""Where a model runs: each target is one row of data, and no other file tests a target's name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ortlm.errors import BadOption, nearest


@dataclass(frozen=True, slots=True)
class Target:
    """What a place to run on can do, and what is fast there.

    ``precisions`` maps each valid precision to the element type of activations and cache.
    ``packed_projections``: one product for queries, keys and values, and one for gate and up. Off where a
    fused kernel of the target wants them apart. ``rotary_inside``: GroupQueryAttention rotates by itself;
    otherwise RotaryEmbedding does, from a ``position_ids`` input. ``query_lengths``: GroupQueryAttention
    takes the number of new tokens per row (input 16), on CPU and CUDA in new ONNX Runtimes. A graph that uses it
    is built next to the one that loads everywhere.
    ``block``, ``symmetric``, ``accuracy_level``, ``head_bits``, ``embed_bits``, ``vision_bits`` are what ``-p
    int4`` means here; ``int8`` takes the same with 8 bits. ``weight_bits`` are those that its kernels know.
    ``half_scales``: fp32 activations have their scales stored in fp16. Off where a graph must hold no fp16.
    ``wide``: recipes may give more bits to the matrices that lose most.
    ``integer_products``: there are fast kernels for MatMulInteger here.
    ``int8_cache``: GroupQueryAttention keeps keys and values in 8 bits here.
    ``packed_mlp``: the same for gate and up alone, if they differ from queries, keys and values.
    ``window_cache``: GroupQueryAttention can keep a window's positions only (``sliding_window_cache``).
    ``attention_ignores``: what its GroupQueryAttention passes over without a word: "softcap", "window", or
    "positions" (those that it is to rotate at, instead of counting from the cache).
    ``without_fp16``: ``precisions`` for devices of this kind that do not compute in fp16 (use_webgpu_fp32).
    ``block_lookup``: GatherBlockQuantized has a kernel here; without one, embeddings are dequantized by other
    operators. ``expert_bits``: what QMoE has been found to be right for here; with none, mixtures of experts are
    refused, and ``no_experts`` says why. ``experts_apart``: experts are products like all others, one after the
    other. ``left_padding``: rows may be padded on the left, too, and whoever runs the graph always says for
    how many positions it wants logits. ``captured``: steps can be recorded once and launched as a whole,
    if the graph copies nothing between main memory and the device. ``fixed_states``: which states of one size
    ("conv", "recurrent") layers may have here. ``shared_kv``: where GroupQueryAttention takes lengths per row, it
    also attends to another layer's cache without new keys.
    """

    name: str
    description: str
    precisions: dict[str, str]
    provider: str | None
    packed_projections: bool
    rotary_inside: bool
    query_lengths: bool
    block: int
    symmetric: bool
    accuracy_level: int
    head_bits: int
    embed_bits: int
    vision_bits: int
    weight_bits: tuple[int, ...] = (2, 4, 8)
    half_scales: bool = False
    wide: bool = False
    integer_products: bool = False
    int8_cache: bool = False
    window_cache: bool = False
    packed_mlp: bool | None = None
    attention_ignores: frozenset[str] = frozenset()
    without_fp16: dict[str, str] = field(default_factory=dict)
    block_lookup: bool = True
    expert_bits: tuple[int, ...] = ()
    no_experts: str = "has not been checked there"
    experts_apart: bool = False
    left_padding: bool = False
    captured: bool = False
    fixed_states: frozenset[str] = frozenset()
    shared_kv: bool = False


_TARGETS = (
    Target(
        name="cpu",
        description="ONNX Runtime's CPU kernels on x86-64 and ARM64 computers",
        # fp32 activations: the x86 kernels convert fp16 to fp32 and back around every operator.
        precisions={"int4": "fp32", "int8": "fp32", "fp32": "fp32"},
        provider=None,
        packed_projections=True,
        rotary_inside=True,
        query_lengths=True,
        block=128,
        symmetric=False,
        accuracy_level=4,
        head_bits=8,
        embed_bits=8,
        vision_bits=8,
        weight_bits=(2, 3, 4, 5, 6, 8),
        half_scales=True,
        # Large blocks leave bits over.
        wide=True,
        integer_products=True,
        int8_cache=True,
        window_cache=True,
        expert_bits=(2, 4, 8),
        fixed_states=frozenset({"conv", "recurrent"}),
        shared_kv=True,
    ),
    Target(
        name="cuda",
        description="NVIDIA GPUs",
        precisions={"int4": "fp16", "int8": "fp16", "fp16": "fp16", "bf16": "bf16"},
        provider="cuda",
        packed_projections=True,
        rotary_inside=True,
        query_lengths=True,
        block=32,
        symmetric=True,
        accuracy_level=0,
        head_bits=8,
        embed_bits=4,
        vision_bits=8,
        weight_bits=(4, 8),
        no_experts="wants weights in a layout of its own there, and computes something else from any other",
        captured=True,
    ),
    Target(
        name="dml",
        description="DirectX 12 GPUs on Windows (DirectML)",
        # DirectML's MatMulNBits knows 4 bits only.
        precisions={"int4": "fp16", "fp16": "fp16"},
        provider="dml",
        packed_projections=False,
        rotary_inside=False,
        query_lengths=False,
        block=32,
        symmetric=True,
        accuracy_level=0,
        head_bits=4,
        embed_bits=4,
        vision_bits=4,
        weight_bits=(4,),
        # Read in onnxruntime-directml 1.24.4's source, not run.
        attention_ignores=frozenset({"softcap", "window"}),
        no_experts="has no kernel there",
    ),
    Target(
        name="webgpu",
        description="browsers and native WebGPU",
        precisions={"int4": "fp16", "int8": "fp16", "fp16": "fp16", "fp32": "fp32"},
        without_fp16={"int4": "fp32", "int8": "fp32", "fp32": "fp32"},
        provider="webgpu",
        # WebGPU fuses three separate projections (and gate and up) by itself, at 4 bits and block 32 only.
        packed_projections=False,
        rotary_inside=True,
        query_lengths=False,
        block=32,
        symmetric=True,
        accuracy_level=4,
        head_bits=4,
        embed_bits=4,
        vision_bits=8,
        weight_bits=(4, 8),
        # Both found by running onnxruntime-ep-webgpu 0.4.0 against the CPU.
        attention_ignores=frozenset({"softcap", "positions"}),
        no_experts="gave other numbers from run to run there",
    ),
    Target(
        name="mobile",
        description="ONNX Runtime's ARM CPU kernels on phones and small devices",
        # KleidiAI's int4 kernels want symmetric blocks of 32; everything at 4 bits keeps the download small.
        precisions={"int4": "fp32", "int8": "fp32"},
        provider=None,
        packed_projections=True,
        rotary_inside=True,
        query_lengths=False,
        block=32,
        symmetric=True,
        accuracy_level=4,
        head_bits=4,
        embed_bits=4,
        vision_bits=8,
        half_scales=True,
        # Run on ARM64, emulated, against x86-64.
        expert_bits=(4, 8),
        fixed_states=frozenset({"conv", "recurrent"}),
    ),
)

TARGETS = {t.name: t for t in _TARGETS}

# What a build itself computes on, in fp32 and with operators that every ONNX Runtime here knows.
HERE = replace(TARGETS["cpu"], query_lengths=False, window_cache=False, experts_apart=True)
# What --layout transformers.js builds: one graph for WebGPU and for WebAssembly, whose build of the CPU provider
# has no GatherBlockQuantized. transformers.js pads on the left.
BROWSER = replace(
    TARGETS["webgpu"],
    name="transformers.js",
    description="WebAssembly and WebGPU",
    provider=None,
    block_lookup=False,
    left_padding=True,
    without_fp16={},
)
PRECISIONS = ("int4", "int8", "fp16", "bf16", "fp32")

# Other names that users of peers type, and the nearest target.
_ALIASES = {"directml": "dml", "gpu": "cuda", "web": "webgpu", "android": "mobile", "ios": "mobile"}
# The precision to offer instead of one that a target cannot do, best first.
_NEAREST_PRECISION = {
    "fp16": ("bf16", "fp32", "int8"),
    "bf16": ("fp16", "fp32", "int8"),
    "fp32": ("fp16", "int8"),
    "int8": ("int4", "fp16"),
    "int4": ("int8",),
}


# Where peers' names suggest something else.
_WHY = {("fp32", "cuda"): ", whose GroupQueryAttention computes in fp16 and bf16 only"}


def find_target(name: str) -> Target:
    """Return the target called ``name``; raises BadOption with the nearest known name."""
    if name in TARGETS:
        return TARGETS[name]
    if name.lower() in TARGETS or name.lower() in _ALIASES:
        meant = _ALIASES.get(name.lower(), name.lower())
        raise BadOption(f"there is no execution provider {name!r}. Did you mean: {meant}?")
    raise BadOption(
        f"there is no execution provider {name!r}; there are {', '.join(TARGETS)}."
        + nearest(name.lower(), [*TARGETS, *_ALIASES])
    )


def check_precision(precision: str, target: Target) -> None:
    """Raise BadOption, naming the nearest valid choice, if ``target`` cannot run ``precision``."""
    if precision in target.precisions:
        return
    if precision not in PRECISIONS:
        raise BadOption(
            f"there is no precision {precision!r}; there are {', '.join(PRECISIONS)}."
            + nearest(precision.lower(), PRECISIONS)
        )
    why = _WHY.get((precision, target.name), "")
    near = next(p for p in _NEAREST_PRECISION[precision] if p in target.precisions)
    others = [t.name for t in _TARGETS if precision in t.precisions]
    also = f", or -p {precision} with -e {' or '.join(others)}" if others else ""
    raise BadOption(
        f"precision {precision} cannot run on {target.name} ({target.description}){why}; it takes "
        f"{', '.join(target.precisions)}. Nearest: -p {near}{also}."
    )
